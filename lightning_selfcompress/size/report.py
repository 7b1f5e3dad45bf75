"""The size of a network: differentiable in bits while it trains, in whole bytes when it is reported.

The differentiable size Q charges real-valued depths; a file holds integers. At b = 0.1 a channel has the levels
{-1, 0} and costs one bit a weight, so both figures are kept and shown side by side.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lightning_selfcompress.packing import Packed, PackedSize, estimated_size, is_half, packed_size
from lightning_selfcompress.quantize.formula import bit_depth, codes, integer_bits
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import QuantizedParameter, learned_tensors, quantized_parameters
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.tables import table
from lightning_selfcompress.tensors import stored_tensors


@torch.no_grad()
def whole_bits(parameter: QuantizedParameter) -> Tensor:
    """Bits of a two's complement integer that holds every code of a channel; 0 if all its codes are 0.

    Args:
        parameter: A quantized weight.

    Returns:
        ``(channels,)``, int64.
    """
    depth, exponent = bit_depth(parameter.raw_depth), parameter.exponent
    # q is monotone in x: the smallest and the largest weight have the smallest and the largest code
    low, high = (codes(x.to(depth), depth, exponent) for x in parameter.spec.axis.extremes(parameter.latent))
    return integer_bits(low, high)


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one quantized weight, or of several added up.

    Args:
        name: Path of the weight's layer.
        weights_before: Weights before compression.
        weights: Weights in channels that are alive (bit depth above 0).
        channels_before: Channels before compression.
        channels: Channels alive.
        learned_bits: Sum of the learned bit depths over all weights, in bits, each weight counted as far as its input
            is alive; divided by ``weights_before`` it is Q, which training minimizes.
        max_bits: Largest learned bit depth of a channel.
        code_bits: Sum over all weights of the whole bits of their codes.
        code_nbytes: Bytes of the codes in a packed file, rounded.
        scale_nbytes: Bytes of the channels' exponents and tables there, rounded.
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

    @property
    def mean_bits(self) -> float:
        """Learned bits per original weight."""
        return self.learned_bits / max(self.weights_before, 1)

    @property
    def whole_bits(self) -> float:
        """Whole bits per original weight, as integer codes."""
        return self.code_bits / max(self.weights_before, 1)


@dataclass(frozen=True)
class SizeReport:
    """Sizes of a model now and as a float network. Prints as a table.

    Args:
        layers: One entry for each quantized weight.
        bias_nbytes: Bytes of the biases of quantized layers.
        other_nbytes: Bytes of everything else: parameters left in float, and buffers.
        structure_nbytes: Bytes of names, shapes and the checksum.
        nbytes: Bytes of the packed file: what :func:`export` writes.
        float_nbytes: Bytes of the same network in float, all parameters and buffers.
    """

    layers: tuple[LayerSize, ...]
    bias_nbytes: int
    other_nbytes: int
    structure_nbytes: int
    nbytes: int
    float_nbytes: int

    @property
    def total(self) -> LayerSize:
        """All quantized weights added up."""
        sums = {f.name: sum(getattr(layer, f.name) for layer in self.layers) for f in fields(LayerSize)[1:]}
        sums["max_bits"] = max((layer.max_bits for layer in self.layers), default=0.0)
        return LayerSize("total", **sums)

    @property
    def bits_per_weight(self) -> float:
        """Q: learned bits per original weight, as training minimizes it."""
        return self.total.mean_bits

    @property
    def weights_left(self) -> float:
        """Share of the original weights that are in channels alive, from 0 to 1."""
        return self.total.weights / max(self.total.weights_before, 1)

    @property
    def channels(self) -> int:
        """Channels alive."""
        return self.total.channels

    def __str__(self) -> str:
        coded = self.nbytes - self.bias_nbytes - self.other_nbytes - self.structure_nbytes
        parts = (
            f"codes and scales {coded:,} + biases {self.bias_nbytes:,} + everything left in float {self.other_nbytes:,}"
            f" + names and shapes {self.structure_nbytes:,} = {self.nbytes:,} bytes"
        )
        share = f"; now {self.nbytes / self.float_nbytes:.1%} of it" if self.float_nbytes else ""
        whole = f"the float network: {self.float_nbytes:,} bytes{share}"
        return "\n".join([table(_HEAD, map(_row, self.layers), _row(self.total)), "", parts, whole])


_HEAD = ("layer", "channels", "of", "weights", "of", "mean bits", "max bits", "whole bits", "code B", "scale B")


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
def layer_size(parameter: QuantizedParameter, learned_bits: float, packed: PackedSize) -> LayerSize:
    """Sizes of one quantized weight.

    Args:
        parameter: A quantized weight.
        learned_bits: Its share of Q times the number of all weights, in bits.
        packed: Sizes of the file that it is a part of.

    Returns:
        Its sizes now.
    """
    depth = bit_depth(parameter.raw_depth)
    n = parameter.weights_per_channel
    alive = int((depth > 0).sum())
    return LayerSize(
        name=parameter.name.removesuffix(".weight"),
        weights_before=parameter.spec.original_numel,
        weights=alive * n,
        channels_before=parameter.spec.original_channels,
        channels=alive,
        learned_bits=learned_bits,
        max_bits=float(depth.max()),
        code_bits=n * int(whole_bits(parameter).sum()),
        code_nbytes=packed.codes.get(parameter.name, 0),  # a weight without entries has none
        scale_nbytes=packed.channels.get(parameter.name, 0),
    )


def size_report(model: nn.Module, *, exact: bool = True, floats: torch.dtype = torch.float32) -> SizeReport:
    """Measures a model: learned bits, whole bits and bytes, layer by layer and in total.

    The bytes are the bytes of the packed file that :func:`export` writes, counted by the code that writes it. Tied
    weights count once.

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
        exact: False estimates the bytes from a sample of the weights, within some percent, in milliseconds.
        floats: The type of values that are not quantized, as for :func:`export`.

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
        tuple(layer_size(p, bits, packed) for p, bits in zip(size.parameters, size.layer_bits(), strict=True)),
        bias_nbytes,
        sum(packed.values.values()) - bias_nbytes,
        packed.structure_nbytes,
        packed.nbytes,
        float_nbytes_of(model),
    )


def float_nbytes_of(model: nn.Module) -> int:
    """Bytes of a model as a float network, before any compression: all parameters and buffers that are saved.

    Args:
        model: Any module, converted or not; removed channels count.
    """
    original = {id(p.latent): p.spec.original_numel for p in quantized_parameters(model)}
    learned = learned_tensors(model)
    removed: int = sum(module.__dict__.get("_removed_nbytes", 0) for module in model.modules())
    stored = (t for t in stored_tensors(model, transient=False).values() if id(t) not in learned)
    return removed + sum(original.get(id(t), t.numel()) * t.element_size() for t in stored)
