"""The quantized weights of a model, each with its depths and exponents."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_selfcompress.quantize.layers import Quantized, QuantizedSpec
from lightning_selfcompress.tensors import name_of


@dataclass(frozen=True, eq=False)
class QuantizedParameter:
    """One quantized weight of a model, tied ones once.

    Args:
        name: Path of the weight in the model, ``"features.0.weight"``.
        layer: The layer it belongs to.
        weight_name: Its name in the layer.
    """

    name: str
    layer: Quantized
    weight_name: str

    @property
    def spec(self) -> QuantizedSpec:
        """How the weight is quantized."""
        return self.layer._quantized[self.weight_name]

    @property
    def latent(self) -> nn.Parameter:
        """The float parameter, in the layer's own shape."""
        return self.layer.latent(self.weight_name)

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        """The trained raw depths, which :func:`bit_depth` reads, and the trained exponents, ``(channels,)`` each."""
        return self.layer.learned(self.weight_name)

    @property
    def raw_depth(self) -> Tensor:
        """The first of :attr:`learned`."""
        return self.learned[0]

    @property
    def exponent(self) -> Tensor:
        """The second of :attr:`learned`."""
        return self.learned[1]

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.raw_depth.numel()

    @property
    def weights_per_channel(self) -> int:
        """Number of weights of one output channel."""
        return self.latent.numel() // max(self.channels, 1)


def learned_names(weight_name: str) -> tuple[str, str]:
    """Names of the raw depths and the exponents of a weight, in its layer or in a state dict.

    Inverse of :func:`weight_name_of`, for any path before the name.

    >>> learned_names("weight"), learned_names("rnn.weight_ih_l0")
    (('bit_depth', 'exponent'), ('rnn.weight_ih_l0_bit_depth', 'rnn.weight_ih_l0_exponent'))
    """
    path, dot, name = weight_name.rpartition(".")
    before = f"{path}{dot}" if name == "weight" else f"{weight_name}_"
    return f"{before}bit_depth", f"{before}exponent"


def weight_name_of(depth_name: str) -> str | None:
    """Name of the weight whose raw depths have this name; None if no raw depths have such a name.

    >>> weight_name_of("net.0.bit_depth"), weight_name_of("rnn.weight_ih_l0_bit_depth"), weight_name_of("net.0.bias")
    ('net.0.weight', 'rnn.weight_ih_l0', None)
    """
    path, dot, name = depth_name.rpartition(".")
    if name == "bit_depth":
        return f"{path}{dot}weight"
    return depth_name.removesuffix("_bit_depth") if name.endswith("_bit_depth") else None


def learned_tensors(model: nn.Module) -> dict[int, Tensor]:
    """All raw depths and exponents of a model, each once, by their ids."""
    return {id(t): t for p in quantized_parameters(model) for t in p.learned}


def quantized_parameters(model: nn.Module) -> Iterator[QuantizedParameter]:
    """The quantized weights of a model in the order of its modules, each once however often it is tied.

    Args:
        model: Any module.

    Yields:
        One :class:`QuantizedParameter` for each latent parameter.
    """
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, Quantized):
            for name in layer._quantized:
                if id(layer.latent(name)) not in seen:
                    seen.add(id(layer.latent(name)))
                    yield QuantizedParameter(name_of(path, name), layer, name)
