"""A price of the user's own: any function of a module that autograd can differentiate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.price import Pull


@dataclass(frozen=True, eq=False)
class OwnPrice:
    """The price that a function gives a model, in bits per original weight.

    Args:
        function: Takes the model and returns a scalar that depends on its weights, bit depths or exponents. It may read
            ``layer.weight``, ``layer.bit_depth`` and ``layer.exponent``.
        model: The converted model.
        parameters: The quantized weights that are priced here.
    """

    function: Callable[[nn.Module], Tensor]
    model: nn.Module
    parameters: tuple[QuantizedParameter, ...]

    @classmethod
    def of(cls, function: Callable[[nn.Module], Tensor], model: nn.Module) -> "OwnPrice":
        """Makes the price of a converted model."""
        return cls(function, model, tuple(quantized_parameters(model)))

    def part(self, parameters: Sequence[QuantizedParameter]) -> "OwnPrice":
        """Returns the same price, with gradients of some of the weights alone."""
        wanted = {id(p.latent) for p in parameters}
        return OwnPrice(self.function, self.model, tuple(p for p in self.parameters if id(p.latent) in wanted))

    def bits_per_weight(self) -> Tensor:
        """Returns what the function says, a scalar.

        Raises:
            TypeError: If the function does not return a tensor of one number.
        """
        value = self.function(self.model)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"Expected the price to be a tensor of one number, in bits per weight, got {value!r}.")
        return value.reshape(())

    def pulls(self, factor: float) -> tuple[Pull, ...]:
        """Returns the gradient of ``factor`` times the price with respect to each weight, its depths and exponents."""
        trained = [t for p in self.parameters for t in (p.latent, *p.learned)]
        with torch.enable_grad():
            value = self.bits_per_weight()
            if not value.requires_grad:
                return tuple(Pull(torch.zeros_like(p.raw_depth)) for p in self.parameters)
            wanted = [t for t in trained if t.requires_grad]
            found = torch.autograd.grad(value * factor, wanted, allow_unused=True)
        gradients = {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}
        pulls = []
        for p in self.parameters:
            of_weight, of_depth, of_exponent = (gradients.get(id(t)) for t in (p.latent, *p.learned))
            add = None if of_weight is None else partial(_add, p, of_weight)
            pulls.append(Pull(torch.zeros_like(p.raw_depth) if of_depth is None else of_depth, of_exponent, add))
        return tuple(pulls)


@torch.no_grad()
def _add(parameter: QuantizedParameter, gradient: Tensor, scale: float) -> None:
    assert parameter.latent.grad is not None
    parameter.latent.grad = parameter.latent.grad + gradient * scale
