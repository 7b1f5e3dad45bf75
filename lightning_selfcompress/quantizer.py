"""The quantizer of self-compressing networks: q(x, b, e), its codes and its closed-form gradient.

Source of the formulas: Cséfalvay and Imber, "Self-Compressing Neural Networks", 2023, arXiv 2301.13142.

Letters used in shapes: ``x`` is a weight of any shape, ``b`` (bit depth) and ``e`` (exponent) have the same number of
dimensions and broadcast to it: size 1 wherever the weights of one channel lie.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

LN2 = math.log(2.0)

# Elements worked on at a time on a CPU: the temporaries of a block stay in the cache, and the extra memory small.
_CPU_BLOCK = 1 << 18


def bit_depth(raw: Tensor) -> Tensor:
    """The bit depth b >= 0 that a raw, trainable depth stands for: ``max(raw, 0)``.

    This is the only reader of the raw parameter. Its gradient is 0 at and below 0: a channel that died stays dead.

    Args:
        raw: Raw depths in bits, any shape, floating point.

    Returns:
        Bit depths in bits, same shape and dtype.
    """
    return torch.relu(raw)


def code_bounds(b: Tensor) -> tuple[Tensor, Tensor]:
    """The clip range ``(-2^(b-1), 2^(b-1) - 1)`` of the codes at bit depth ``b``.

    Args:
        b: Bit depths in bits, any shape.

    Returns:
        Lower and upper bound, each of the shape of ``b``.
    """
    half = torch.exp2(b - 1)
    return -half, half - 1


def codes(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """The integer codes ``round(min(max(2^-e x, -2^(b-1)), 2^(b-1) - 1))``, as floating point numbers.

    Rounding goes to the nearest integer, halves to even.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits, broadcasts to ``x``.
        e: Exponents (log2 of the step between levels), broadcasts to ``x``.

    Returns:
        Codes of the shape of ``x``.
    """
    return torch.clamp(x * torch.exp2(-e), *code_bounds(b)).round_()


def q_composite(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """:func:`q` written in ordinary operations, rounding passed straight through, differentiated by autograd.

    For compilers and tracers, which fuse it themselves, and as the reference of :func:`q`.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits, broadcasts to ``x``.
        e: Exponents, broadcasts to ``x``.

    Returns:
        Quantized weights, shape and dtype of ``x``.
    """
    level = x * torch.exp2(-e)
    low, high = code_bounds(b)
    clipped = torch.where(level < low, low, torch.where(level > high, high, level))
    rounded = clipped + (clipped.round() - clipped).detach()
    return (torch.exp2(e) * rounded).to(x.dtype)


def q(x: Tensor, b: Tensor, e: Tensor, *, value: Tensor | None = None) -> Tensor:
    """Quantize: ``q(x, b, e) = 2^e * round(min(max(2^-e x, -2^(b-1)), 2^(b-1) - 1))``.

    Rounding passes its gradient straight through; everything else is differentiated as written, so ``b`` and ``e``
    learn along with ``x``. The gradient is in closed form and keeps nothing but the inputs.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits, >= 0, same number of dimensions as ``x`` and broadcasts to it.
        e: Exponents, the shape of ``b``.
        value: What :func:`quantize` returned for the same inputs, to spare the computation. The result shares its
            memory.

    Returns:
        Quantized weights, shape and dtype of ``x``.

    Raises:
        ValueError: If ``b`` and ``e`` differ in shape or do not broadcast to ``x``.
    """
    if b.shape != e.shape or b.dim() != x.dim() or any(n not in (1, m) for n, m in zip(b.shape, x.shape, strict=True)):
        raise ValueError(
            f"Expected bit depths and exponents of one shape that broadcasts to the weights {tuple(x.shape)}, "
            f"got {tuple(b.shape)} and {tuple(e.shape)}. Reshape them to size 1 in every dimension but the channels'."
        )
    return cast(Tensor, _Quantize.apply(x, b, e, value))  # type: ignore[no-untyped-call]


def initial_exponent(
    low: Tensor,  # (channels,)
    high: Tensor,  # (channels,)
    bits: float,
    fallback: float,
) -> Tensor:
    """The smallest exponent at which the clip range at ``bits`` holds all weights of a channel.

    Rounding then changes no weight by more than half a level, ``2^(e-1)``.

    Args:
        low: Smallest weight of each channel.
        high: Largest weight of each channel.
        bits: Bit depth the channels start with, > 1.
        fallback: Largest weight to expect where all weights of all channels are zero, > 0.

    Returns:
        Exponents ``(channels,)``, dtype of ``low``. A channel of zeros gets the largest exponent of the others.
    """
    lowest, highest = code_bounds(torch.tensor(bits, dtype=low.dtype, device=low.device))
    step = torch.maximum(low / lowest, high / highest)
    largest = step.max() if bool((step > 0).any()) else fallback / highest
    return torch.where(step > 0, step, largest).log2()


@torch.no_grad()
def quantize(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """The value of :func:`q` without a gradient.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits, same number of dimensions as ``x`` and broadcasts to it.
        e: Exponents, the shape of ``b``.

    Returns:
        Quantized weights, a new tensor with the shape and dtype of ``x``.
    """
    scale, inverse = torch.exp2(e), torch.exp2(-e)
    low, high = code_bounds(b)
    out = torch.empty_like(x)
    for i, c in _blocks(x, b):
        level = torch.mul(x[i], inverse[c])
        # torch.clamp with tensors as bounds is several times slower on a CPU
        torch.minimum(torch.maximum(level, low[c], out=level), high[c], out=level)
        out[i] = level.round_().mul_(scale[c])
    return out


def q_backward(
    grad: Tensor,  # (shape of x)
    x: Tensor,
    b: Tensor,
    e: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`q` in closed form.

    With y = 2^-e x, the masks below (y < -2^(b-1)), above (y > 2^(b-1) - 1) and inside (neither)::

        dq/dx = inside
        dq/db = ln 2 * 2^e * 2^(b-1) * (above - below)
        dq/de = ln 2 * (q - x * inside)

    summed over the weights of each channel for b and e.

    Args:
        grad: Gradient of the loss with respect to q.
        x: Weights, as in :func:`q`.
        b: Bit depths in bits, as in :func:`q`.
        e: Exponents, as in :func:`q`.

    Returns:
        Gradients with respect to ``x``, ``b`` and ``e``, each with the shape and dtype of its variable.
    """
    scale, inverse = torch.exp2(e), torch.exp2(-e)
    low, high = code_bounds(b)
    within = tuple(d for d, n in enumerate(b.shape) if n == 1)
    grad_x, grad_b, grad_e = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
    for i, c in _blocks(x, b):
        g, level = grad[i].to(scale.dtype), x[i] * inverse[c]
        clipped = torch.maximum(level, low[c])
        torch.minimum(clipped, high[c], out=clipped)
        side = level.sub_(clipped).sign_()  # above - below; products with it are faster than masks
        outside = side * g
        grad_b[c] += outside.sum(within, keepdim=True)
        inside = torch.addcmul(g, outside, side, value=-1, out=outside)
        grad_x[i] = inside
        grad_e[c] += clipped.round_().mul_(g).sum(within, keepdim=True) * scale[c]
        grad_e[c] -= inside.mul_(x[i]).sum(within, keepdim=True)
    return grad_x, (grad_b * scale * (-low) * LN2).to(b.dtype), (grad_e * LN2).to(e.dtype)


def _blocks(x: Tensor, b: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts the first dimension: slices of ``x``, each with the slice of ``b`` and ``e`` that belongs to it."""
    rows = x.shape[0]
    step = rows
    if x.device.type == "cpu" and x.numel() > _CPU_BLOCK:
        step = max(1, _CPU_BLOCK * rows // x.numel())
    for start in range(0, rows, max(step, 1)):
        block = slice(start, start + step)
        yield block, block if b.shape[0] == rows else slice(None)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, b: Tensor, e: Tensor, value: Tensor | None) -> Tensor:
        return quantize(x, b, e) if value is None else value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, b, e, _ = inputs
        ctx.save_for_backward(x, b, e)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, e = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            wanted = [t for t in (x, b, e) if t.requires_grad]
            grads = iter(torch.autograd.grad(q_composite(x, b, e), wanted, grad, create_graph=True))
            return *(next(grads) if t.requires_grad else None for t in (x, b, e)), None
        return *q_backward(grad, x, b, e), None
