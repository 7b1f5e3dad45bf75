"""The price in bytes: a differentiable rate of the codes of a network, as a packed file codes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import Range, bit_depth
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.coupling import Coupling
from lightning_selfcompress.size.price import Pull
from lightning_selfcompress.size.rate import LN2, counted_rate, rate_slope, zero_rate
from lightning_selfcompress.tensors import add_whole, is_sharded, whole

EMPTY = 0.1  # mean magnitude of a channel's codes at which it begins to be paid for as one that may go


CHANNEL_BITS = 8.0  # of a channel's exponent, class and bound in a file, about


@dataclass(frozen=True, eq=False)
class ModelBytes:
    """The rate of the codes of one model, to be evaluated at every step; its constants are computed once.

    With m_i the mean magnitude of the codes of channel i and n_i the number of its weights, the codes take
    ``R = sum_i n_i H(m_i)`` bits, see :func:`code_rate`. Rounding passes its gradient straight through: a code's
    magnitude is inversely proportional to the step size, grows with the weight, and at the ends of the clip range with
    the range. So R reaches weights, exponents and bit depths.

    A channel that goes takes more with it: the zeros among its consumers' codes, its values in float, its exponent.
    With P_c the bits of all these, channel c costs ``P_c (1 - prod_k exp(-m_k / m_0))`` over its producers k, m_0 =
    :data:`EMPTY`, in the gradient; the value counts P_c as long as a code is left. The value counts zeros apart, see
    :func:`counted_rate`, so that it is nearer to the file; the gradient is that of H, which is smooth.

    Args:
        parameters: The quantized weights.
        n: Number of weights of each channel, ``(channels,)``, in the order of ``parameters``.
        original_numel: N, the number of weights before compression.
        coupling: The coupling of the weights; None if there are no weights.
        whole: The price of the whole model if this is a part, otherwise None.
        float_bits: Bits of a value that is left in float.
    """

    parameters: tuple[QuantizedParameter, ...]
    n: Tensor
    original_numel: int
    coupling: Coupling | None
    whole: "ModelBytes | None" = None
    float_bits: float = 32.0

    @classmethod
    def of(cls, model: nn.Module, *, float_bits: float = 32.0) -> "ModelBytes":
        """Makes the rate of a converted model.

        Args:
            model: A module. Its quantized weights are looked up once, in this call.
            float_bits: Bits of a value that is left in float.
        """
        parameters = tuple(quantized_parameters(model))
        if not parameters:
            return cls((), torch.zeros(0), 0, None)
        n = [p.raw_depth.new_full((p.channels,), p.weights_per_channel, requires_grad=False) for p in parameters]
        numel = sum(p.spec.original_numel for p in parameters)
        return cls(parameters, torch.cat(n), numel, Coupling.of(parameters), float_bits=float_bits)

    def part(self, parameters: Sequence[QuantizedParameter]) -> "ModelBytes":
        """Returns the share of some of the weights, over the same N: the shares of all weights add up to the price."""
        wanted = {id(p.latent) for p in parameters}
        chosen = tuple(p for p in self.parameters if id(p.latent) in wanted)
        return replace(self, parameters=chosen, whole=self.whole or self)

    @torch.no_grad()
    def bits_per_weight(self) -> Tensor:
        """Returns the bits of the codes and of what goes with their channels, divided by N: a scalar."""
        whole, own = self.whole or self, {id(p.latent) for p in self.parameters}
        coupling = whole.coupling
        if not own or coupling is None:
            return torch.zeros(())
        values, m, n, _ = whole.living()
        nonzero = torch.cat([_counts(*value) for value in values]).to(n)
        bits = counted_rate(n, nonzero, n * m) + CHANNEL_BITS * (m > 0)
        first = torch.full((coupling.count + 1,), len(m), device=m.device)  # of the weights that make a channel
        rows = torch.arange(len(m), device=m.device)
        first.scatter_reduce_(0, torch.where(m > 0, coupling.produced, coupling.count), rows, "amin")
        bits = bits + whole.float_bits * coupling.floats * (first[coupling.produced] == rows)
        of_weights = zip(whole.parameters, bits.split([p.channels for p in whole.parameters]), strict=True)
        return torch.stack([b.sum() for p, b in of_weights if id(p.latent) in own]).sum() / self.original_numel

    @torch.no_grad()
    def pulls(self, factor: float) -> tuple[Pull, ...]:
        """Returns the gradient of ``factor`` times the price with respect to each weight, its depths and exponents.

        The quantized weights stay in memory as long as what is returned.
        """
        whole = self.whole or self
        if not self.parameters or whole.coupling is None:
            return ()
        values, m, n, shares = whole.living()
        slope = (rate_slope(m) + whole._channel_slope(m, n, shares)) * (factor / self.original_numel)
        exponent = -LN2 * n * m * slope
        sizes, own = [p.channels for p in whole.parameters], {id(p.latent) for p in self.parameters}
        by_weight = zip(
            whole.parameters, values, slope.split(sizes), exponent.split(sizes), m.split(sizes), strict=True
        )
        return tuple(
            _CodePull(p, *value, along, _outside(p, *value)).pull(of_exponent, mean)
            for p, value, along, of_exponent, mean in by_weight
            if id(p.latent) in own
        )

    def living(self) -> tuple[list[tuple[Tensor, Range]], Tensor, Tensor, list[Tensor]]:
        """Returns the weights with zeros at dead inputs, their codes' mean magnitude and number, and inputs' shares.

        The magnitudes and numbers are those of each channel; the shares are those of the inputs that are alive. An
        input that is dead is about to go, so that its codes cost nothing any more and feel no price.
        """
        coupling = self.coupling
        assert coupling is not None
        alive = coupling.alive(bit_depth(torch.cat([p.raw_depth for p in self.parameters])))
        shares = coupling.shares(alive)
        n = self.n * math.prod(shares, start=self.n.new_ones(coupling.weights))[coupling.weight]
        values = [p.quantized() for p in self.parameters]
        if not bool(alive.all()):
            values = [
                (_at_living(p, value, positions, alive), known)
                for p, (value, known), positions in zip(self.parameters, values, coupling.positions, strict=True)
            ]
        sums = torch.cat([_sums(*value) for value in values]).to(n)
        return values, sums / n.clamp(min=1), n, shares

    def _channel_slope(self, m: Tensor, n: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Returns what one more step of magnitude costs a channel as a whole, ``(channels,)``, in bits."""
        coupling = self.coupling
        assert coupling is not None
        zeros = m.new_zeros(coupling.weights).index_add_(0, coupling.weight, n * zero_rate(m))
        there = torch.exp(m.new_zeros(coupling.count + 1).index_add_(0, coupling.produced, m) / -EMPTY)
        cost = coupling.input_cost(zeros, shares)[coupling.produced]
        cost = cost + CHANNEL_BITS + coupling.floats * self.float_bits
        return cost * there[coupling.produced] * (coupling.produced < coupling.count) / (EMPTY * n.clamp(min=1))


@dataclass(frozen=True, eq=False)
class _CodePull:
    """The gradient of the rate of one weight's codes.

    Args:
        parameter: The quantized weight.
        value: Its value, in the shape of the split weight.
        known: The range of its codes.
        slope: What one more step of magnitude costs in each channel, ``(channels,)``.
        outside: Which weights lie outside the clip range, in the shape of ``value``; None if none does.
    """

    parameter: QuantizedParameter
    value: Tensor
    known: Range
    slope: Tensor
    outside: Tensor | None

    def pull(self, exponent: Tensor, magnitude: Tensor) -> Pull:
        """Returns the gradient with respect to depths, exponents and the weight."""
        return Pull(self._of_depths(), exponent, self.add_to_weight, magnitude)

    def _of_depths(self) -> Tensor:
        """A code at an end of the clip range moves by ``ln 2 * 2^(b-1)`` a bit, as long as its weight lies outside."""
        if self.outside is None:
            return torch.zeros_like(self.slope)
        within, low = self.known.within, self.known.low
        moving = self.outside & (self.value != 0)
        count = moving.sum(within, keepdim=True, dtype=low.dtype) if within else moving.to(low)
        return (count * low * -LN2).flatten() * self.slope * (self.parameter.raw_depth > 0)

    @torch.no_grad()
    def add_to_weight(self, scale: float) -> None:
        """Adds the gradient of the weight, times ``scale``, to the gradient that the weight has."""
        latent, axis = self.parameter.latent, self.parameter.spec.axis
        sign = self.value.sign()
        if self.outside is not None:
            sign.masked_fill_(self.outside, 0)
        pull = (self.slope.view_as(self.known.scale) * self.known.inverse * scale).to(sign.dtype)
        gradient = latent.grad
        assert gradient is not None
        if is_sharded(gradient):
            add_whole(gradient, axis.join(sign.mul_(pull)))
        else:
            axis.split(gradient).addcmul_(sign, pull)


def _sums(value: Tensor, known: Range) -> Tensor:
    """Returns the sum of the magnitudes of the codes of each channel, ``(channels,)``."""
    within = known.within
    total = torch.linalg.vector_norm(value, 1, within, dtype=known.scale.dtype) if within else value.abs()
    return total.flatten() / known.scale.flatten()


def _counts(value: Tensor, known: Range) -> Tensor:
    """Returns how many codes of each channel are not zero, ``(channels,)``."""
    within = known.within
    return ((value != 0).sum(within) if within else value != 0).flatten()


def _at_living(p: QuantizedParameter, value: Tensor, positions: Mapping[int, Tensor], alive: Tensor) -> Tensor:
    """Returns a split weight with zeros at the inputs that are dead."""
    axis = p.spec.axis
    for dim, channels in positions.items():
        living = alive[channels]
        if not bool(living.all()):
            shape = [-1 if d == dim else 1 for d in range(p.latent.dim())]
            value = axis.split(axis.join(value) * living.view(shape))
    return value


def _outside(p: QuantizedParameter, value: Tensor, known: Range) -> Tensor | None:
    """Returns which weights lie outside the clip range, in the shape of the split weight; None if none does."""
    within = known.within
    if value.numel() and within:
        if within == tuple(range(1, value.dim())):  # torch is ten times as fast along one dimension as along several
            high, low = value.flatten(1).amax(1), value.flatten(1).amin(1)
        else:
            high, low = value.amax(within).flatten(), value.amin(within).flatten()
        largest = torch.maximum(high, -low) * known.inverse.flatten()
        if not bool((largest > known.high.flatten() - 1).any()):
            return None
    level = p.spec.axis.split(whole(p.latent.detach())) * known.inverse
    return (level < known.low) | (level > known.high)
