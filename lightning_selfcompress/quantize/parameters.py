"""The quantized weights of a model, each with its depths and exponents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from lightning_selfcompress.quantize.layers import Quantized, QuantizedSpec


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
    def raw_depth(self) -> nn.Parameter:
        """The trained raw depths, ``(channels,)``; read them with :func:`bit_depth`."""
        return cast(nn.Parameter, self.layer._parameters[self.spec.bit_depth])

    @property
    def exponent(self) -> nn.Parameter:
        """The trained exponents, ``(channels,)``."""
        return cast(nn.Parameter, self.layer._parameters[self.spec.exponent])

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.raw_depth.numel()

    @property
    def weights_per_channel(self) -> int:
        """Number of weights of one output channel."""
        return self.latent.numel() // max(self.channels, 1)


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
                    yield QuantizedParameter(f"{path}.{name}".lstrip("."), layer, name)
