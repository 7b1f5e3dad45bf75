"""The exact landing: codes are moved until a network's packed file is as small as it is to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_selfcompress.packing import Packed, packed_size
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.rate import rate_slope
from lightning_selfcompress.tensors import whole

_ROUNDS = 40  # of moves by one step each
_HALVINGS = 24
_COARSEST = 24  # octaves
_FAR = 1.1  # times the target: from further above, steps are made coarser before single codes are moved


@dataclass(frozen=True)
class Landing:
    """What a landing has done.

    Args:
        before: Bytes of the packed file before.
        after: Bytes of the packed file now.
        moved: Number of weights whose code was moved.
        weights: Number of weights.
    """

    before: int
    after: int
    moved: int
    weights: int


def file_nbytes(model: nn.Module) -> int:
    """Returns the bytes of a model's packed file."""
    return packed_size(Packed.of(model, measured=True)).nbytes


@torch.no_grad()
def land(
    model: nn.Module,
    target: int,
    importance: Mapping[int, Tensor] | None = None,
    measure: Callable[[nn.Module], int] = file_nbytes,
) -> Landing:
    """Moves codes towards zero, the cheapest first, until the packed file is at or just under a size.

    Where the file is far larger, as after a very short training, the steps of all channels are made coarser first. Then
    a code moves by one step. What that costs is taken to be ``importance * step^2 * (2 (|y| - |c|) + 1)`` with y the
    latent weight in steps and c its code: nothing for a weight at the edge to the smaller code. What it gains is
    :func:`rate_slope`, in bits. Codes are moved in the order of cost over gain, as many as it takes; a moved weight
    becomes exactly its new code.

    Args:
        model: A converted module. Nothing is changed if it is small enough.
        target: The largest size that is allowed, in bytes.
        importance: How much the loss minds a change of each weight: id of the latent weight -> an estimate of the
            loss's curvature, of the shape of the weight. Weights without one get the mean of the others.
        measure: Returns the bytes of a model.

    Returns:
        What was done. It is above the target if no more codes can be moved.
    """
    before = now = measure(model)
    weights = list(quantized_parameters(model))
    if before > _FAR * target:
        now = _coarsen(model, weights, int(_FAR * target), measure)
    moved: dict[int, Tensor] = {}
    for _ in range(_ROUNDS):
        if now <= target:
            break
        candidates = [_Candidates.of(p, importance or {}) for p in weights if p.latent.numel()]
        if not any(bool(c.prices.isfinite().any()) for c in candidates):
            break
        now = _round(model, candidates, target, measure)
        for c in candidates:
            changed = c.changed()
            key = id(c.parameter.latent)
            moved[key] = changed | moved[key] if key in moved else changed
    count = sum(int(flags.sum()) for flags in moved.values())
    return Landing(before, now, count, sum(p.latent.numel() for p in weights))


def _coarsen(
    model: nn.Module, weights: Sequence[QuantizedParameter], limit: int, measure: Callable[[nn.Module], int]
) -> int:
    """Multiplies all steps by the smallest power of 2^(1/16) that brings the file within a limit. Returns its bytes."""
    starts = [p.exponent.detach().clone() for p in weights]

    def at(sixteenths: int) -> int:
        for p, start in zip(weights, starts, strict=True):
            p.exponent.copy_(start + sixteenths / EXPONENT_STEPS)
        return measure(model)

    low, high = 0, _COARSEST * EXPONENT_STEPS  # too fine, and coarse enough if anything is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= limit else (middle, high)
    return at(high)


def _round(model: nn.Module, candidates: "list[_Candidates]", target: int, measure: Callable[[nn.Module], int]) -> int:
    """Moves as few codes as it takes, by one step each; all of them if that is not enough. Returns the bytes."""
    prices = torch.cat([c.prices.flatten() for c in candidates])
    prices = prices[prices.isfinite()].sort().values
    low, high = 0, len(prices)  # so many moves are too few, and enough

    def at(count: int) -> int:
        limit = float(prices[count - 1]) if count else -1.0
        for c in candidates:
            c.apply(limit)
        return measure(model)

    everything = at(high)
    if everything > target:
        return everything
    for _ in range(_HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= target else (middle, high)
    return at(high)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The moves of one weight's codes by one step towards zero.

    Args:
        parameter: The quantized weight.
        start: The latent weight before the moves.
        goal: The latent weight after all moves.
        prices: Cost over gain of each move; infinite where the code is 0.
    """

    parameter: QuantizedParameter
    start: Tensor
    goal: Tensor
    prices: Tensor

    @classmethod
    def of(cls, parameter: QuantizedParameter, importance: Mapping[int, Tensor]) -> "_Candidates":
        axis, latent = parameter.spec.axis, parameter.latent.detach()
        value, known = parameter.quantized()
        codes = (value * known.inverse).round_()
        within = known.within
        magnitude = codes.abs()
        mean = magnitude.mean(within, keepdim=True) if within else magnitude
        level = (axis.split(latent).abs() * known.inverse).minimum(magnitude + 0.5).maximum(magnitude - 0.5)
        cost = (2 * (level - magnitude) + 1).add_(1e-3) * known.scale.square()
        known_importance = importance.get(id(parameter.latent))
        if known_importance is not None:
            cost = cost * axis.split(known_importance.to(cost))
        elif importance:
            cost = cost * torch.stack([t.mean() for t in importance.values()]).mean().to(cost)
        prices = torch.where(codes == 0, torch.inf, cost / rate_slope(mean))
        goal = ((codes - codes.sign()) * known.scale).to(latent.dtype)
        return cls(parameter, latent.clone(), axis.join(goal), axis.join(prices))

    def apply(self, limit: float) -> None:
        """Moves the codes whose price is at most a limit, and puts all others back."""
        self.parameter.latent.copy_(torch.where(self.prices <= limit, self.goal, self.start))

    def changed(self) -> Tensor:
        """Returns which weights were moved."""
        return self.parameter.latent.detach() != self.start


def curvatures(model: nn.Module, optimizers: "list[torch.optim.Optimizer]") -> dict[int, Tensor]:
    """Returns what adaptive optimizers know of the loss's curvature: their mean squared gradients, by latent weight.

    Args:
        model: A converted module.
        optimizers: The optimizers that train it.
    """
    states = {id(p): s for o in optimizers for p, s in o.state.items()}
    found = {}
    for p in quantized_parameters(model):
        squares = states.get(id(p.latent), {}).get("exp_avg_sq")
        if isinstance(squares, Tensor) and squares.shape == p.latent.shape:
            found[id(p.latent)] = whole(squares)
    return found
