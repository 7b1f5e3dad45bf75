"""The quantizer of activations: q_a(x, e), its closed-form gradient, the choice of e.

A step size is one number for a whole tensor, ``2^e`` with e in sixteenths, as those of weights are. The exponent is
learned as in Esser et al., "Learned Step Size Quantization", 2020, arXiv 1902.08153, but in the logarithm.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, LN2, step_size
from lightning_selfcompress.quantize.layers import is_transformed

LEAST_BITS, MOST_BITS = 2, 8


_TRIED = 3 * EXPONENT_STEPS  # exponents below the one that holds all values, among which the best is chosen


_SAMPLES = 1 << 16


_EDGE = 1e-4  # of a step: what lies at a limit is inside


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Returns the smallest and the largest code of an activation.

    >>> from lightning_selfcompress.activations.formula import code_limits
    >>> code_limits(8, True), code_limits(8, False)
    ((-128, 127), (0, 255))
    """
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def q_a(x: Tensor, e: Tensor, bits: int, signed: bool) -> Tensor:
    """Quantizes activations: ``q_a(x, e) = 2^e * round(min(max(2^-e x, low), high))``.

    Rounding has a straight-through estimator as its gradient: that of x is the gradient of the output inside of the
    range and 0 outside; with y = 2^-e x that of e is ``ln 2 * 2^e * sum(g * (round(clip(y)) - y * inside))``.

    >>> import torch
    >>> from lightning_selfcompress.activations import q_a
    >>> q_a(torch.tensor([-0.3, 0.1, 0.4, 90.0]), torch.tensor(-2.0), bits=8, signed=False).tolist()
    [0.0, 0.0, 0.5, 63.75]

    Args:
        x: Activations, floating point, any shape.
        e: The exponent, log2 of the step size; a tensor of one element.
        bits: Bit depth, from 2 to 8.
        signed: Whether codes are negative as well.

    Returns:
        Quantized activations, of the shape and dtype of ``x``.
    """
    low, high = code_limits(bits, signed)
    if is_transformed():
        return q_a_composite(x, e, low, high)
    return cast(Tensor, _QuantizeActivation.apply(x, e, low, high))  # type: ignore[no-untyped-call]


def q_a_composite(x: Tensor, e: Tensor, low: int, high: int) -> Tensor:
    """Computes :func:`q_a` with ordinary operations, for compilers, tracers and second derivatives."""
    wide, e = _wide(x), e.reshape(1)  # a compiler cannot look up one number in the table of steps
    step = step_size(e)
    slope = torch.exp2(e - e.detach())  # equals 1, and has the derivative ln 2 with respect to e
    level = wide * ((1 / step) / slope).to(wide.dtype)
    clipped = level.clamp(low, high)
    rounded = clipped + (clipped.round() - clipped).detach()
    return (rounded * (step * slope).to(wide.dtype)).view(x.shape).to(x.dtype)


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, e)  # not the result, which the network may change in place
        ctx.limits = low, high
        wide, step = _wide(x), step_size(e)
        codes = torch.mul(wide, (1 / step).to(wide.dtype)).clamp_(low, high).round_()
        return codes.mul_(step.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, e = ctx.saved_tensors
        low, high = ctx.limits
        if torch.is_grad_enabled():  # with create_graph=True the gradient must be differentiable
            wanted = [t for t in (x, e) if t.requires_grad]
            grads = iter(torch.autograd.grad(q_a_composite(x, e, low, high), wanted, grad, create_graph=True))
            return *(next(grads) if t.requires_grad else None for t in (x, e)), None, None
        wide, g, step = _wide(x), _wide(grad), step_size(e)
        level = wide * (1 / step).to(wide.dtype)
        inside = torch.ops.aten.hardtanh_backward(g, level, low - _EDGE, high + _EDGE)  # torch's fastest mask on a CPU
        if not ctx.needs_input_grad[1]:
            return inside.to(x.dtype), None, None, None
        order = (0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else range(x.dim())
        flat_g, flat_inside, flat = (t.permute(*order).reshape(-1) for t in (g, inside, level))
        moved = -torch.dot(flat_inside, flat)
        moved = moved + torch.dot(flat_g, flat.clamp_(low, high).round_())
        return inside.to(x.dtype), (moved.to(e.dtype) * step * LN2).view(e.shape), None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@torch.no_grad()
def best_exponent(values: Tensor, bits: int, signed: bool) -> float:
    """Returns the exponent, in sixteenths, at which the squared error of some activations is least.

    Args:
        values: Activations, floating point, any shape; of many, a part is looked at.
        bits: Bit depth.
        signed: Whether codes are negative as well.
    """
    values = sample(values)
    low, high = code_limits(bits, signed)
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest:
        return float(-bits)
    top = torch.tensor(largest / high, dtype=torch.float64).log2().mul(EXPONENT_STEPS).ceil()
    tried = (top - torch.arange(_TRIED, dtype=torch.float64)) / EXPONENT_STEPS
    errors = [(q_a_composite(values, e, low, high) - values).square().sum() for e in tried]
    return float(tried[int(torch.stack(errors).argmin())])


def sample(values: Tensor) -> Tensor:
    """Returns a copy of some activations in double precision, spread over all of them that are finite."""
    flat = values.detach()[values.detach().isfinite()]
    return flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.float64, copy=True)
