"""The report of a network's size in learned bits, whole bits and bytes.

The differentiable size Q counts real-valued bit depths, while a file holds integers: at b = 0.1 a channel has the
levels {-1, 0} and costs one bit per weight. The report therefore shows both figures.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.activations.layers import activated_modules
from lightning_selfcompress.packing import Packed, PackedSize, estimated_size, is_half, packed_size
from lightning_selfcompress.quantize.formula import bit_depth, codes, integer_bits
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import QuantizedParameter, learned_tensors, quantized_parameters
from lightning_selfcompress.size.drawing import draw_parts
from lightning_selfcompress.size.operations import uses_of
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.tables import html_table, table
from lightning_selfcompress.tensors import stored_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@torch.no_grad()
def whole_bits(parameters: Sequence[QuantizedParameter]) -> tuple[NDArray[np.int64], ...]:
    """Returns the bits of a two's complement integer that holds any code of a channel; 0 if all its codes are 0.

    Args:
        parameters: Quantized weights.

    Returns:
        The bits of each channel of each weight, ``(channels,)`` each.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    found: dict[int, NDArray[np.int64]] = {}
    for i, parameter in enumerate(parameters):
        if parameter.latent.numel():
            alike.setdefault((parameter.raw_depth.dtype, parameter.raw_depth.device), []).append(i)
        else:
            found[i] = np.zeros(parameter.channels, np.int64)
    for (dtype, _), places in alike.items():
        some = [parameters[i] for i in places]
        depth, exponent = bit_depth(torch.cat([p.raw_depth for p in some])), torch.cat([p.exponent for p in some])
        # q is monotone in x, so the smallest and the largest weight have the smallest and the largest code
        extremes = zip(*(p.spec.axis.extremes(p.latent) for p in some), strict=True)
        low, high = (codes(torch.cat([t.to(dtype) for t in ends]), depth, exponent) for ends in extremes)
        bits = integer_bits(low, high).cpu().numpy()
        found.update(zip(places, np.split(bits, np.cumsum([p.channels for p in some])[:-1]), strict=True))
    return tuple(found[i] for i in range(len(parameters)))


@dataclass(frozen=True)
class LayerSize:
    """The sizes of one quantized weight, or the total of several.

    Args:
        name: Path of the weight's layer.
        weights_before: Number of weights before compression.
        weights: Number of weights in live channels, whose bit depth is above 0.
        channels_before: Number of output channels before compression.
        channels: Number of live output channels.
        learned_bits: Sum of the learned bit depths over all weights, in bits; each weight counts as far as its inputs
            are alive. The total over all layers, divided by the total of ``weights_before``, is Q.
        max_bits: Largest learned bit depth of a channel, in bits.
        code_bits: Sum over all weights of the whole bits of their codes.
        code_nbytes: Bytes of the codes in the packed file, rounded.
        scale_nbytes: Bytes of the channels' exponents, bounds and classes in the packed file, rounded.
        macs_before: Multiply-accumulates of one inference with these weights before compression; 0 if not known.
        macs: Multiply-accumulates of one inference with the weights in live channels; 0 if not known.
    """

    name: str
    weights_before: int
    weights: int
    channels_before: int
    channels: int
    learned_bits: float
    max_bits: float
    code_bits: int
    code_nbytes: int
    scale_nbytes: int
    macs_before: int = 0
    macs: int = 0

    @property
    def mean_bits(self) -> float:
        """The learned bits per original weight."""
        return self.learned_bits / max(self.weights_before, 1)

    @property
    def whole_bits(self) -> float:
        """The whole bits of the integer codes per original weight."""
        return self.code_bits / max(self.weights_before, 1)


@dataclass(frozen=True)
class SizeReport:
    """The sizes of a model now and as a float network. ``print`` shows the report as a table.

    Args:
        layers: The sizes of each quantized weight.
        bias_nbytes: Bytes of the biases of quantized layers.
        other_nbytes: Bytes of all other parameters and buffers that are not quantized.
        structure_nbytes: Bytes of names, shapes, attributes and the checksum.
        nbytes: Bytes of the packed file that :func:`export` writes.
        float_nbytes: Bytes of all parameters and saved buffers of the same network in float, before compression.
        activation_bits: The bit depth of each activation that is quantized.
    """

    layers: tuple[LayerSize, ...]
    bias_nbytes: int
    other_nbytes: int
    structure_nbytes: int
    nbytes: int
    float_nbytes: int
    activation_bits: tuple[int, ...] = ()

    @property
    def total(self) -> LayerSize:
        """The total over all quantized weights."""
        sums = {f.name: sum(getattr(layer, f.name) for layer in self.layers) for f in fields(LayerSize)[1:]}
        sums["max_bits"] = max((layer.max_bits for layer in self.layers), default=0.0)
        return LayerSize("total", **sums)

    @property
    def bits_per_weight(self) -> float:
        """The paper's Q: learned bits per original weight."""
        return self.total.mean_bits

    @property
    def weights_left(self) -> float:
        """The share of the original weights that are in live channels, from 0 to 1."""
        return self.total.weights / max(self.total.weights_before, 1)

    @property
    def channels(self) -> int:
        """The number of live output channels."""
        return self.total.channels

    @property
    def share_of_float(self) -> float:
        """The bytes as a share of the float network's; the bytes themselves if it has none."""
        return self.nbytes / max(self.float_nbytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON: the fields, the layers as dictionaries, and the totals.

        >>> from torch import nn
        >>> from lightning_selfcompress import convert, size_report
        >>> net = nn.Linear(100, 50)
        >>> plan = convert(net, initial_bits=4)
        >>> values = size_report(net).to_dict()
        >>> values["bits_per_weight"], values["layers"][0]["channels"]
        (4.0, 50)
        """
        return asdict(self) | {
            "layers": [_values(layer) for layer in self.layers],
            "total": _values(self.total),
            "bits_per_weight": self.bits_per_weight,
            "weights_left": self.weights_left,
        }

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure | None, Axes]":
        """Draws the bytes of each layer in the packed file, and those of everything else; needs matplotlib.

        >>> from torch import nn
        >>> from lightning_selfcompress import convert, size_report
        >>> net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> plan = convert(net, initial_bits=4)
        >>> figure, ax = size_report(net).plot()

        Args:
            ax: Axes to draw on; by default those of a new figure.

        Returns:
            The new figure, or None if axes were given, and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is missing.
        """
        layers = [
            (
                x.name,
                x.code_nbytes + x.scale_nbytes,
                f"{x.channels:,} of {x.channels_before:,}, {x.mean_bits:.1f} learned bits",
            )
            for x in self.layers
        ]
        others = [
            ("biases", self.bias_nbytes, ""),
            ("left in float", self.other_nbytes, ""),
            ("names and shapes", self.structure_nbytes, ""),
        ]
        return draw_parts([*layers, *others], self._bytes_text(), ax)

    def _repr_html_(self) -> str:
        """The table of layers in a notebook, and below it the bytes."""
        layers = html_table(_HEAD, map(_row, self.layers), _row(self.total)) if self.layers else f"<p>{NOTHING}</p>"
        return f"{layers}<p>{self._bytes_text()}</p>"

    def _bytes_text(self) -> str:
        share = f", {self.share_of_float:.1%} of it" if self.float_nbytes else ""
        return f"{self.float_nbytes:,} bytes in float, now {self.nbytes:,}{share}"

    def __str__(self) -> str:
        coded = self.nbytes - self.bias_nbytes - self.other_nbytes - self.structure_nbytes
        parts = (
            f"codes and scales {coded:,} + biases {self.bias_nbytes:,} + everything left in float {self.other_nbytes:,}"
            f" + names and shapes {self.structure_nbytes:,} = {self.nbytes:,} bytes"
        )
        share = f"; now {self.share_of_float:.1%} of float" if self.float_nbytes else ""
        whole = f"the float network: {self.float_nbytes:,} bytes{share}"
        macs = []
        if self.total.macs_before:
            left = self.total.macs / self.total.macs_before
            macs = [f"multiply-accumulates: {self.total.macs:,} of {self.total.macs_before:,}, {left:.1%}"]
        layers = table(_HEAD, map(_row, self.layers), _row(self.total)) if self.layers else NOTHING
        return "\n".join([layers, "", parts, whole, *macs, *_activations_text(self.activation_bits)])


def _activations_text(bits: Sequence[int]) -> list[str]:
    """Returns the lines on quantized activations, one for each bit depth; none without any."""
    counts = sorted(Counter(bits).items())
    return [f"{n} {'activation' if n == 1 else 'activations'} in {b} bits, one step size each" for b, n in counts]


def _values(size: LayerSize) -> dict[str, Any]:
    """The fields of a weight's sizes, and the bits per original weight."""
    return asdict(size) | {"mean_bits": size.mean_bits, "whole_bits": size.whole_bits}


NOTHING = "Nothing in it is compressed."  # what is said of a float network, and of its checkpoint
_HEAD = ("layer", "channels", "of", "weights", "of", "learned bits", "max learned", "whole bits", "code B", "scale B")


def _row(size: LayerSize) -> tuple[str, ...]:
    counts = (size.channels, size.channels_before, size.weights, size.weights_before)
    bits = (size.mean_bits, size.max_bits, size.whole_bits)
    return (
        size.name,
        *(f"{n:,}" for n in counts),
        *(f"{n:.2f}" for n in bits),
        f"{size.code_nbytes:,}",
        f"{size.scale_nbytes:,}",
    )


@torch.no_grad()
def layer_sizes(
    parameters: Sequence[QuantizedParameter], learned_bits: Sequence[float], packed: PackedSize
) -> tuple[LayerSize, ...]:
    """Returns the sizes of each of a model's quantized weights.

    Args:
        parameters: Quantized weights.
        learned_bits: The learned bits of each weight, from :meth:`ModelSize.layer_bits`.
        packed: The size of the model's packed file.
    """
    if not parameters:
        return ()
    depths = bit_depth(torch.cat([p.raw_depth for p in parameters])).cpu().numpy()
    depth_of = np.split(depths, np.cumsum([p.channels for p in parameters])[:-1])
    found = []
    for p, bits, depth, whole in zip(parameters, learned_bits, depth_of, whole_bits(parameters), strict=True):
        n, alive = p.weights_per_channel, int((depth > 0).sum())
        found.append(
            LayerSize(
                name=p.name.removesuffix(".weight"),
                weights_before=p.spec.original_numel,
                weights=alive * n,
                channels_before=p.spec.original_channels,
                channels=alive,
                learned_bits=bits,
                max_bits=float(depth.max(initial=0)),
                code_bits=n * int(whole.sum()),
                code_nbytes=packed.codes.get(p.name, 0),  # an empty weight has no codes
                scale_nbytes=packed.channels.get(p.name, 0),
                macs_before=round(p.spec.original_numel * (uses_of(p) or 0)),
                macs=round(alive * n * (uses_of(p) or 0)),
            )
        )
    return tuple(found)


def size_report(model: nn.Module, *, exact: bool = True, floats: torch.dtype = torch.float32) -> SizeReport:
    """Measures a model: learned bits, whole bits and bytes, layer by layer and in total.

    The bytes are the bytes of the packed file that :func:`export` writes, counted by the code that writes the file.
    Tied weights count once.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert, size_report
    >>> net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> plan = convert(net, initial_bits=4)
    >>> report = size_report(net)  # print(report) shows a table
    >>> report.bits_per_weight, report.channels, report.float_nbytes
    (4.0, 60, 22240)
    >>> report.nbytes < report.float_nbytes / 6
    True

    Args:
        model: Any module, converted or not.
        exact: Whether the bytes are exact. If False, they are estimated from a sample of the weights, within some
            percent, in milliseconds.
        floats: The dtype of values that are not quantized, as for :func:`export`; the estimate ignores it.

    Returns:
        The report; ``print`` shows it as a table.
    """
    packed = packed_size(Packed.of(model, half=is_half(floats), measured=True)) if exact else estimated_size(model)
    size = ModelSize.of(model)
    learned = learned_tensors(model)
    layers = (module for module in model.modules() if isinstance(module, Quantized))
    biases = {id(t) for layer in layers for name, t in layer._parameters.items() if "bias" in name}
    stored = stored_tensors(model, transient=False)
    bias_nbytes = sum(packed.values[n] for n, t in stored.items() if id(t) in biases and id(t) not in learned)
    return SizeReport(
        layer_sizes(size.parameters, size.layer_bits(), packed),
        bias_nbytes,
        sum(packed.values.values()) - bias_nbytes,
        packed.structure_nbytes,
        packed.nbytes,
        float_nbytes_of(model),
        tuple(point.bits for _, module in activated_modules(model) for point in module._points),
    )


def float_nbytes_of(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters and saved buffers in float, before any compression.

    Args:
        model: Any module, converted or not. Channels that were removed count too.
    """
    original = {id(p.latent): p.spec.original_numel for p in quantized_parameters(model)}
    learned = learned_tensors(model)
    removed: int = sum(module.__dict__.get("_removed_nbytes", 0) for module in model.modules())
    stored = (t for t in stored_tensors(model, transient=False).values() if id(t) not in learned)
    return removed + sum(original.get(id(t), t.numel()) * t.element_size() for t in stored)
