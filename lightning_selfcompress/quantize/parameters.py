"""The quantized weights of a model, each with its raw bit depths and its exponents."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import Range
from lightning_selfcompress.quantize.layers import COUPLING, Quantized, QuantizedSpec
from lightning_selfcompress.tensors import SIZES, name_of


@dataclass(frozen=True, eq=False)
class QuantizedParameter:
    """One quantized weight of a model; tied weights are one object.

    Args:
        name: Path of the weight in the model, for example ``"features.0.weight"``.
        layer: The first layer that has the weight.
        weight_name: Name of the weight in this layer.
    """

    name: str
    layer: Quantized
    weight_name: str

    @property
    def spec(self) -> QuantizedSpec:
        """The description of how the weight is quantized."""
        return self.layer._quantized[self.weight_name]

    @property
    def latent(self) -> nn.Parameter:
        """The latent weight: the float parameter, in the shape that the layer gives it."""
        return self.layer.latent(self.weight_name)

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        """The raw bit depths, which :func:`bit_depth` reads, and the exponents, ``(channels,)`` each."""
        return self.layer.learned(self.weight_name)

    @property
    def raw_depth(self) -> Tensor:
        """The raw bit depths, ``(channels,)``, in bits."""
        return self.learned[0]

    @property
    def exponent(self) -> Tensor:
        """The exponents, ``(channels,)``."""
        return self.learned[1]

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return self.raw_depth.numel()

    @property
    def weights_per_channel(self) -> int:
        """The number of weights of one output channel."""
        return self.latent.numel() // max(self.channels, 1)

    def quantized(self) -> tuple[Tensor, Range]:
        """Returns the quantized weight and its range, arranged as :meth:`ChannelAxis.split` does, without gradients."""
        return self.layer.known(self.weight_name)


def learned_names(weight_name: str) -> tuple[str, str]:
    """Returns the names of a weight's raw bit depths and exponents, in its layer or in a state dict.

    The name may begin with any path. :func:`weight_name_of` is the inverse function.

    >>> learned_names("weight"), learned_names("rnn.weight_ih_l0")
    (('bit_depth', 'exponent'), ('rnn.weight_ih_l0_bit_depth', 'rnn.weight_ih_l0_exponent'))
    """
    path, dot, name = weight_name.rpartition(".")
    before = f"{path}{dot}" if name == "weight" else f"{weight_name}_"
    return f"{before}bit_depth", f"{before}exponent"


def weight_name_of(depth_name: str) -> str | None:
    """Returns the name of the weight whose raw bit depths have this name, or None for the name of any other tensor.

    >>> weight_name_of("net.0.bit_depth"), weight_name_of("rnn.weight_ih_l0_bit_depth"), weight_name_of("net.0.bias")
    ('net.0.weight', 'rnn.weight_ih_l0', None)
    """
    path, dot, name = depth_name.rpartition(".")
    if name == "bit_depth":
        return f"{path}{dot}weight"
    return depth_name.removesuffix("_bit_depth") if name.endswith("_bit_depth") else None


USES = "_uses"  # the layer attribute in which ``size.operations`` notes how often weights are used


_OF_THE_LIBRARIES = frozenset(vars(nn.Module())) | {
    "_quantized",
    "_quantized_values",
    COUPLING,
    USES,
    SIZES,
    "_removed_nbytes",
    "_points",
    "_shortcut",
    "_trainer",
    "_fabric",
}


def attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of the attributes that a module's own code has set.

    Parameters, buffers, children and hooks are left out, and so is what a quantized layer and Lightning keep in it.
    """
    return ((name, value) for name, value in vars(module).items() if name not in _OF_THE_LIBRARIES)


def learned_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Returns all raw bit depths and exponents of a model by the ids of the tensors."""
    return {id(t): t for p in quantized_parameters(model) for t in p.learned}


def quantized_parameters(model: nn.Module) -> Iterator[QuantizedParameter]:
    """Yields the quantized weights of a model in the order of its modules; tied weights are yielded once.

    Args:
        model: Any module.

    Yields:
        One :class:`QuantizedParameter` for each latent weight.
    """
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, Quantized):
            for name in layer._quantized:
                if id(layer.latent(name)) not in seen:
                    seen.add(id(layer.latent(name)))
                    yield QuantizedParameter(name_of(path, name), layer, name)


def quantized_layers(model: nn.Module) -> Iterator[Quantized]:
    """Yields the quantized layers of a model, each once."""
    return (layer for layer in model.modules() if isinstance(layer, Quantized))


def forget_quantized(layers: Iterable[Quantized]) -> None:
    """Has layers compute their quantized weights anew at the next access."""
    for layer in layers:
        layer.forget_quantized()
