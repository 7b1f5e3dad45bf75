"""The price of a network: its differentiable size Q, in bits per original weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.coupling import Coupling


def size_bits(
    b: Tensor,  # (channels,)
    n: Tensor,  # (channels,)
) -> Tensor:
    """Size in bits, ``sum_l z_l`` with ``z_l = sum_i n_(l,i) b_(l,i)``, differentiable in ``b``.

    Divided by the number of weights before compression it is the paper's Q, in bits per weight.
    Source: Cséfalvay and Imber 2023, arXiv 2301.13142.

    Args:
        b: Bit depths of all channels of all layers, in bits.
        n: Weights of each channel that still have a live input.

    Returns:
        Scalar, in bits.
    """
    return torch.dot(b, n)


@dataclass(frozen=True, eq=False)
class ModelSize:
    """The Q of one model, ready to be evaluated at every step: constants made once.

    Args:
        parameters: The quantized weights.
        n: Weights of each channel ``(channels,)``, in the order of ``parameters``, all inputs counted.
        original_numel: N, the number of weights before compression.
        coupling: Through which channels the weights are coupled; None if there are no weights.
        whole: The size that this one is a part of.
    """

    parameters: tuple[QuantizedParameter, ...]
    n: Tensor
    original_numel: int
    coupling: Coupling | None = None
    whole: "ModelSize | None" = None

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """The size of a converted model.

        Weights count as far as their inputs are alive, and a channel pays for the weights that vanish with it, if the
        layers have notes on the channels that they make and read (:func:`couple`); otherwise all inputs count.

        Args:
            model: A module; its quantized weights are found once, here.

        Returns:
            The size, over no weights at all if nothing is quantized.
        """
        parameters = tuple(quantized_parameters(model))
        if not parameters:
            return cls((), torch.zeros(0), 0)
        n = [p.raw_depth.new_full((p.channels,), p.weights_per_channel, requires_grad=False) for p in parameters]
        return cls(parameters, torch.cat(n), sum(p.spec.original_numel for p in parameters), Coupling.of(parameters))

    def part(self, parameters: Sequence[QuantizedParameter]) -> "ModelSize":
        """The share of some of the weights, over the same N: the shares of all weights add up to Q."""
        wanted = {id(p.latent) for p in parameters}
        chosen = [(p, n) for p, n in zip(self.parameters, self._split(self.n), strict=True) if id(p.latent) in wanted]
        n = torch.cat([n for _, n in chosen]) if chosen else self.n[:0]
        return ModelSize(tuple(p for p, _ in chosen), n, self.original_numel, whole=self.whole or self)

    def bits_per_weight(self) -> Tensor:
        """Q in bits per original weight, a scalar differentiable in every raw depth."""
        if not self.parameters:
            return torch.zeros(())
        whole = self.whole or self
        own = {id(p.latent) for p in self.parameters}
        mask = torch.cat([torch.full((p.channels,), id(p.latent) in own) for p in whole.parameters]).to(self.n.device)
        raw = torch.cat([p.raw_depth for p in whole.parameters])
        return whole._bits(raw, mask) / self.original_numel

    @torch.no_grad()
    def layer_bits(self) -> list[float]:
        """The z of each of ``parameters``, in bits; divided by N, they add up to Q."""
        if not self.parameters:
            return []
        b = bit_depth(torch.cat([p.raw_depth for p in self.parameters])).double()
        n = self.n.to(b) if self.coupling is None else self.n.to(b) * self.coupling.live_share(b)
        return [float(z.sum()) for z in self._split(b * n)]

    @torch.no_grad()
    def gradients(self, factor: float) -> tuple[Tensor, ...]:
        """``factor * dQ/db`` with respect to the raw depths of each of ``parameters``, ``(channels,)`` each.

        Q is the size of the whole model: a depth also pays for weights of other layers that another optimizer trains.
        """
        whole = self.whole or self
        if not whole.parameters:
            return ()
        b = bit_depth(torch.cat([p.raw_depth for p in whole.parameters]))
        n = whole.n.to(b)
        gradient = n if whole.coupling is None else whole.coupling.size_gradient(b, n)
        gradient = gradient * b.sign().mul_(factor / self.original_numel)  # a depth at 0 learns nothing
        by_weight = {id(p.latent): g for p, g in zip(whole.parameters, whole._split(gradient), strict=True)}
        return tuple(by_weight[id(p.latent)] for p in self.parameters)

    def _bits(self, raw: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n = bit_depth(raw), self.n.to(raw)
        n = n if self.coupling is None else n * self.coupling.live_share(b)
        return size_bits(b, n if mask is None else n * mask)

    def _split(self, per_channel: Tensor) -> tuple[Tensor, ...]:
        return torch.split(per_channel, [p.channels for p in self.parameters])
