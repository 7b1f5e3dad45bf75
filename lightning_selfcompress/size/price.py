"""The price of a network: the differentiable size Q, in bits per original weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.coupling import Coupling


def size_bits(
    b: Tensor,  # (channels,)
    n: Tensor,  # (channels,)
) -> Tensor:
    """Returns the size in bits, ``sum_l z_l`` with ``z_l = sum_i n_(l,i) b_(l,i)``, differentiable in ``b``.

    The size divided by the number of weights before compression is the paper's Q, in bits per weight.
    Source: Cséfalvay and Imber 2023, arXiv 2301.13142.

    >>> import torch
    >>> from lightning_selfcompress.size import size_bits
    >>> b = torch.tensor([4.0, 2.5, 0.0])  # three channels, the last one dead
    >>> n = torch.tensor([9.0, 9.0, 9.0])
    >>> float(size_bits(b, n))
    58.5

    Args:
        b: Bit depths of all channels of all layers, in bits.
        n: Number of weights of each channel that still have a live input.

    Returns:
        A scalar, in bits.
    """
    return torch.dot(b, n)


class Pull(NamedTuple):
    """The gradient of a price with respect to one quantized weight, its bit depths and its exponents.

    Args:
        depth: Gradient of the raw bit depths, ``(channels,)``.
        exponent: Gradient of the exponents, ``(channels,)``; None if there is none.
        weight: Adds the gradient of the weight, times a number, to the weight's ``grad``; None if it has none.
        magnitude: Mean magnitude of the codes of each channel, ``(channels,)``, if it is known.
    """

    depth: Tensor
    exponent: Tensor | None = None
    weight: Callable[[float], None] | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ModelSize:
    """The size Q of one model, to be evaluated at every step; its constants are computed once.

    Args:
        parameters: The quantized weights.
        n: Number of weights of each channel with all inputs counted, ``(channels,)``, in the order of ``parameters``.
        original_numel: N, the number of weights before compression.
        coupling: The coupling of the weights; None for a part, and if there are no weights.
        whole: The size of the whole model if this size is a part, otherwise None.
    """

    parameters: tuple[QuantizedParameter, ...]
    n: Tensor
    original_numel: int
    coupling: Coupling | None = None
    whole: "ModelSize | None" = None

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """Makes the size of a converted model.

        If the layers have notes on the channels that they produce and read (:func:`couple`), a weight counts as far as
        its inputs are alive, and a channel pays for all weights removed with it. Otherwise all inputs count.

        Args:
            model: A module. Its quantized weights are looked up once, in this call.

        Returns:
            The size; it has no weights if nothing is quantized.
        """
        parameters = tuple(quantized_parameters(model))
        if not parameters:
            return cls((), torch.zeros(0), 0)
        n = [p.raw_depth.new_full((p.channels,), p.weights_per_channel, requires_grad=False) for p in parameters]
        return cls(parameters, torch.cat(n), sum(p.spec.original_numel for p in parameters), Coupling.of(parameters))

    def part(self, parameters: Sequence[QuantizedParameter]) -> "ModelSize":
        """Returns the share of some of the weights in Q, over the same N: the shares of all weights add up to Q."""
        wanted = {id(p.latent) for p in parameters}
        chosen = [(p, n) for p, n in zip(self.parameters, self._split(self.n), strict=True) if id(p.latent) in wanted]
        n = torch.cat([n for _, n in chosen]) if chosen else self.n[:0]
        return ModelSize(tuple(p for p, _ in chosen), n, self.original_numel, whole=self.whole or self)

    def bits_per_weight(self) -> Tensor:
        """Returns Q in bits per original weight, a scalar that is differentiable in every raw bit depth."""
        if not self.parameters:
            return torch.zeros(())
        whole = self.whole or self
        own = {id(p.latent) for p in self.parameters}
        mask = torch.cat([torch.full((p.channels,), id(p.latent) in own) for p in whole.parameters]).to(self.n.device)
        raw = torch.cat([p.raw_depth for p in whole.parameters])
        return whole._bits(raw, mask) / self.original_numel

    @torch.no_grad()
    def layer_bits(self) -> list[float]:
        """Returns the z of each weight in bits; for a whole model their sum divided by N is Q."""
        if not self.parameters:
            return []
        b = bit_depth(torch.cat([p.raw_depth for p in self.parameters])).double()
        n = self.n.to(b) if self.coupling is None else self.n.to(b) * self.coupling.live_share(b)
        return [float(z.sum()) for z in self._split(b * n)]

    @torch.no_grad()
    def gradients(self, factor: float) -> tuple[Tensor, ...]:
        """Returns ``factor * dQ/db`` with respect to the raw bit depths of each weight, ``(channels,)`` each.

        Q is the size of the whole model: a bit depth also pays for weights of other layers that another optimizer
        trains.
        """
        whole = self.whole or self
        if not whole.parameters:
            return ()
        b = bit_depth(torch.cat([p.raw_depth for p in whole.parameters]))
        n = whole.n.to(b)
        gradient = n if whole.coupling is None else whole.coupling.size_gradient(b, n)
        gradient = gradient * b.sign().mul_(factor / self.original_numel)  # the gradient of a bit depth at 0 is 0
        by_weight = {id(p.latent): g for p, g in zip(whole.parameters, whole._split(gradient), strict=True)}
        return tuple(by_weight[id(p.latent)] for p in self.parameters)

    def pulls(self, factor: float) -> tuple[Pull, ...]:
        """Returns :meth:`gradients` as pulls on depths alone."""
        return tuple(map(Pull, self.gradients(factor)))

    def _bits(self, raw: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n = bit_depth(raw), self.n.to(raw)
        n = n if self.coupling is None else n * self.coupling.live_share(b)
        return size_bits(b, n if mask is None else n * mask)

    def _split(self, per_channel: Tensor) -> tuple[Tensor, ...]:
        return torch.split(per_channel, [p.channels for p in self.parameters])
