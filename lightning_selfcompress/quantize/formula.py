"""The quantizer of self-compressing networks: q(x, b, e), its integer codes and its closed-form gradient.

Source of the formulas: Cséfalvay and Imber, "Self-Compressing Neural Networks", 2023, arXiv 2301.13142.

Notation: ``x`` is a weight of any shape. The bit depths ``b`` and the exponents ``e`` have as many dimensions as ``x``
and broadcast to ``x``: their size is 1 in each dimension along which the weights of one channel lie.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

LN2 = math.log(2.0)


EXPONENT_STEPS = 16  # steps per unit of the exponent: files hold sixteenths, so neighboring step sizes differ by 4%


_EXPONENT_LIMIT = 128


_STEPS = torch.from_numpy(
    np.exp2(np.arange(-_EXPONENT_LIMIT * EXPONENT_STEPS, _EXPONENT_LIMIT * EXPONENT_STEPS) / EXPONENT_STEPS)
)


# Number of elements per block on a CPU, so that the temporaries of a block stay in the cache and need little memory.
_CPU_BLOCK = 1 << 18


def bit_depth(raw: Tensor) -> Tensor:
    """Returns the bit depth b >= 0 of a raw, trainable bit depth: ``b = max(raw, 0)``.

    The gradient is 0 where ``raw <= 0``, so a dead channel stays dead.

    >>> import torch
    >>> from lightning_selfcompress.quantize import bit_depth
    >>> raw = torch.tensor([-0.5, 0.0, 3.5], requires_grad=True)
    >>> bit_depth(raw).tolist()
    [0.0, 0.0, 3.5]
    >>> bit_depth(raw).sum().backward()
    >>> raw.grad.tolist()
    [0.0, 0.0, 1.0]

    Args:
        raw: Raw bit depths in bits, any shape, floating point.

    Returns:
        Bit depths in bits, of the shape and dtype of ``raw``.
    """
    return torch.relu(raw)


def code_bounds(b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the clip range ``(-2^(b-1), 2^(b-1) - 1)`` of the codes at bit depth ``b``.

    Args:
        b: Bit depths in bits, any shape.

    Returns:
        The lower and the upper bound, each of the shape of ``b``.
    """
    half = torch.exp2(b - 1)
    return -half, half - 1


def step_size(e: Tensor) -> Tensor:
    """Returns the step size between levels: ``2^e`` with ``e`` rounded to sixteenths, which files hold.

    The step sizes come from a table, so that they are the same numbers on every machine and at every place of a tensor.

    Args:
        e: Exponents, any shape, floating point.

    Returns:
        Step sizes of the shape and dtype of ``e``. Exponents outside -128 to 127.9375 are clamped to this range.
    """
    limit = _EXPONENT_LIMIT * EXPONENT_STEPS
    places = (e.detach() * EXPONENT_STEPS).round_().clamp_(-limit, limit - 1).add_(limit)
    table = _STEPS.to(e) if torch.compiler.is_compiling() else _steps_like(e.dtype, e.device)
    return table[places.long()]


@lru_cache
def _steps_like(dtype: torch.dtype, device: torch.device) -> Tensor:
    return _STEPS.to(device, dtype)


def codes(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Returns the integer codes ``round(min(max(2^-e x, -2^(b-1)), 2^(b-1) - 1))`` in a floating-point dtype.

    Numbers are rounded to the nearest integer, and halves to the nearest even integer.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits; they broadcast to ``x``.
        e: Exponents (log2 of the step size between levels); they broadcast to ``x``.

    Returns:
        Codes of the shape of ``x``.
    """
    return torch.clamp(x * (1 / step_size(e)), *code_bounds(b)).round_()


def q_composite(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Computes :func:`q` with ordinary operations and a straight-through estimator, differentiated by autograd.

    Compilers and tracers use this function, because they can fuse its operations. The function is also the reference
    of :func:`q`.

    Args:
        x: Weights, floating point.
        b: Bit depths in bits; they broadcast to ``x``.
        e: Exponents; they broadcast to ``x``.

    Returns:
        Quantized weights, of the shape and dtype of ``x``.
    """
    step = step_size(e)
    slope = torch.exp2(e - e.detach())  # equals 1, and has the derivative ln 2 with respect to e
    level = x * ((1 / step) / slope)
    low, high = code_bounds(b)
    clipped = torch.where(level < low, low, torch.where(level > high, high, level))
    rounded = clipped + (clipped.round() - clipped).detach()
    return (step * slope * rounded).to(x.dtype)


class Range(NamedTuple):
    """The step sizes and clip ranges of channels, of the shape of ``b``, computed once for a value and its gradient.

    Args:
        scale: Step size between levels, ``2^e``.
        inverse: Inverse of the step size, ``2^-e``.
        low: Lower clip limit of the codes.
        high: Upper clip limit of the codes.
    """

    scale: Tensor
    inverse: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, b: Tensor, e: Tensor) -> "Range":
        """Computes the range of bit depths ``b`` and exponents ``e``."""
        step = step_size(e)
        return cls(step, 1 / step, *code_bounds(b))

    @property
    def within(self) -> tuple[int, ...]:
        """The dimensions along which the weights of one channel lie."""
        return tuple(d for d, n in enumerate(self.scale.shape) if n == 1)

    def rows(self, block: slice) -> "Range":
        """Returns the range of a slice of the first dimension."""
        return Range(*(t[block] for t in self))


def q(x: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Quantizes weights: ``q(x, b, e) = 2^e * round(min(max(2^-e x, -2^(b-1)), 2^(b-1) - 1))``.

    Rounding has a straight-through estimator as its gradient. Everything else is differentiated as written, so ``b``
    and ``e`` are learned together with ``x``. The gradient is computed in closed form; the graph keeps the inputs and
    one :class:`Range` for it.

    >>> import torch
    >>> from lightning_selfcompress.quantize import q
    >>> x = torch.tensor([[0.3, -0.6, 5.0], [0.3, -0.6, 5.0]])
    >>> b = torch.tensor([[3.0], [0.0]])  # three bits for the first channel, none for the second
    >>> q(x, b, e=torch.full((2, 1), -1.0)).tolist()  # levels are 2^-1 apart
    [[0.5, -0.5, 1.5], [-0.0, -0.0, -0.0]]

    Args:
        x: Weights, floating point.
        b: Bit depths in bits, >= 0, with as many dimensions as ``x``; they broadcast to ``x``.
        e: Exponents, of the shape of ``b``.

    Returns:
        Quantized weights, of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``b`` and ``e`` differ in shape or do not broadcast to ``x``.
    """
    if b.shape != e.shape or b.dim() != x.dim() or any(n not in (1, m) for n, m in zip(b.shape, x.shape, strict=True)):
        raise ValueError(
            f"Expected bit depths and exponents of one shape that broadcasts to the weights {tuple(x.shape)}, "
            f"got {tuple(b.shape)} and {tuple(e.shape)}. Reshape them to size 1 in every dimension but the channels'."
        )
    with torch.no_grad():
        known = Range.of(b, e)
        value = quantize(x, known)
    return cast(Tensor, _Quantize.apply(x, b, e, value, known, False, None))  # type: ignore[no-untyped-call]


def q_known(
    x: Tensor,
    raw: Tensor,  # (channels,)
    e: Tensor,  # (channels,)
    value: Tensor,  # (shape of x)
    known: Range,
    on_backward: Callable[[], object] | None = None,
) -> Tensor:
    """Returns a known value of ``q(x, bit_depth(raw), e)`` as one node of the autograd graph.

    Args:
        x: Weights, floating point.
        raw: Raw bit depths in bits; the gradient passes through :func:`bit_depth` as well.
        e: Exponents.
        value: The value of q; the result shares its memory.
        known: Range of the bit depths and exponents, of a shape that broadcasts to ``x``.
        on_backward: A function that is called in the backward pass, before the gradient is computed.

    Returns:
        Quantized weights, of the shape and dtype of ``x``.
    """
    return cast(Tensor, _Quantize.apply(x, raw, e, value, known, True, on_backward))  # type: ignore[no-untyped-call]


def initial_exponent(
    low: Tensor,  # (channels,)
    high: Tensor,  # (channels,)
    bits: float,
    fallback: float,
) -> Tensor:
    """Returns the smallest exponent, in sixteenths, at which the clip range at ``bits`` holds all weights of a channel.

    Rounding then changes no weight by more than half a step, ``2^(e-1)``.

    Args:
        low: Smallest weight of each channel.
        high: Largest weight of each channel.
        bits: Bit depth of all channels at the start, > 1.
        fallback: Largest weight to expect if all weights of all channels are zero, > 0.

    Returns:
        Exponents ``(channels,)``, of the dtype of ``low``. A channel of zeros gets the largest exponent of the others.
    """
    lowest, highest = code_bounds(torch.tensor(bits, dtype=low.dtype, device=low.device))
    step = torch.maximum(low / lowest, high / highest)
    largest = step.max() if bool((step > 0).any()) else fallback / highest
    return (torch.where(step > 0, step, largest).log2() * EXPONENT_STEPS).ceil() / EXPONENT_STEPS


def quantize(x: Tensor, known: Range) -> Tensor:
    """Computes the value of :func:`q`. The caller disables gradients.

    Args:
        x: Weights, floating point.
        known: Range of the bit depths and exponents, of a shape that broadcasts to ``x``.

    Returns:
        Quantized weights, in a new tensor of the shape and dtype of ``x``.
    """
    if _is_one_block(x):
        return _quantize_block(x, known).to(x.dtype)
    out = torch.empty_like(x)
    for i, c in _blocks(x, known.scale):
        out[i] = _quantize_block(x[i], known.rows(c))
    return out


def _quantize_block(x: Tensor, known: Range) -> Tensor:
    level = torch.mul(x, known.inverse)
    # On a CPU, torch.clamp with tensors as bounds is several times slower.
    torch.minimum(torch.maximum(level, known.low, out=level), known.high, out=level)
    return level.round_().mul_(known.scale)


def q_backward(
    grad: Tensor,  # (shape of x)
    x: Tensor,
    known: Range,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradient of :func:`q` in closed form.

    With y = 2^-e x, the derivatives of q are as follows, where the masks are below (y < -2^(b-1)),
    above (y > 2^(b-1) - 1) and inside (neither)::

        dq/dx = inside
        dq/db = ln 2 * 2^e * 2^(b-1) * (above - below)
        dq/de = ln 2 * 2^e * (round(clip(y)) - y * inside)

    The gradients with respect to b and e are summed over the weights of each channel.

    Args:
        grad: Gradient of the loss with respect to q.
        x: Weights, as in :func:`q`.
        known: Range of the bit depths and exponents, of a shape that broadcasts to ``x``.

    Returns:
        The gradient with respect to ``x``, in the dtype of ``x``, and the gradients with respect to ``b`` and ``e``, in
        the shape of ``known``.
    """
    within = known.within
    if _is_one_block(x):
        inside, sum_b, sum_e = _gradient_block(grad, x, known, within)
        grad_x = inside.to(x.dtype)
    else:
        grad_x, sum_b, sum_e = torch.empty_like(x), torch.zeros_like(known.scale), torch.zeros_like(known.scale)
        for i, c in _blocks(x, known.scale):
            grad_x[i], block_b, block_e = _gradient_block(grad[i], x[i], known.rows(c), within)
            sum_b[c] += block_b
            sum_e[c] += block_e
    slope = known.scale * LN2
    return grad_x, sum_b.mul_(slope).mul_(known.low), sum_e.mul_(slope)


def _gradient_block(
    grad: Tensor,  # (shape of x)
    x: Tensor,
    known: Range,
    within: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradient of x, and the sums over the dimensions ``within`` in the gradients of b and e."""
    g, level = grad.to(known.scale.dtype), x * known.inverse
    clipped = torch.maximum(level, known.low)
    torch.minimum(clipped, known.high, out=clipped)
    side = torch.sub(clipped, level).sign_()  # below - above; a product with this tensor is faster than a mask
    outside = side * g
    sum_b = outside.sum(within, keepdim=True)
    inside = torch.addcmul(g, outside, side, value=-1, out=outside)
    rounded = torch.round(clipped, out=level)  # clipped is level inside, and finite where level is infinite
    return inside, sum_b, rounded.mul_(g).addcmul_(inside, clipped, value=-1).sum(within, keepdim=True)


def _is_one_block(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.numel() <= _CPU_BLOCK


def _blocks(x: Tensor, b: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields slices of the first dimension of ``x``, each with the matching slice of ``b`` and ``e``."""
    rows = x.shape[0]
    step = max(1, _CPU_BLOCK * rows // x.numel())
    for start in range(0, rows, step):
        block = slice(start, start + step)
        yield block, block if b.shape[0] == rows else slice(None)


class _Quantize(torch.autograd.Function):
    """q with a known value and range; ``b`` holds raw bit depths ``(channels,)`` or bit depths that broadcast to x."""

    # There is no setup_context, because torch would then bind the arguments by the signature, which takes longer than
    # the quantization of a small layer.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b: Tensor,
        e: Tensor,
        value: Tensor,
        known: Range,
        is_raw: bool,
        on_backward: Callable[[], object] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, b, e)
        ctx.known, ctx.is_raw, ctx.on_backward = known, is_raw, on_backward
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.on_backward is not None:
            ctx.on_backward()
        x, b, e = ctx.saved_tensors
        unused = (None,) * 4
        if torch.is_grad_enabled():  # with create_graph=True the gradient must be differentiable
            wanted = [t for t in (x, b, e) if t.requires_grad]
            shape = ctx.known.scale.shape
            out = q_composite(x, (bit_depth(b) if ctx.is_raw else b).view(shape), e.view(shape))
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(grads) if t.requires_grad else None for t in (x, b, e)), *unused
        grad_x, grad_b, grad_e = q_backward(grad, x, ctx.known)
        grad_b, grad_e = grad_b.view(b.shape).to(b.dtype), grad_e.view(e.shape).to(e.dtype)
        return grad_x, grad_b.masked_fill_(b <= 0, 0) if ctx.is_raw else grad_b, grad_e, *unused


def integer_bits(
    low: Tensor,  # (channels,)
    high: Tensor,  # (channels,)
) -> Tensor:
    """Counts the bits of a two's complement integer that holds ``low`` to ``high``; the count is 0 if both are 0.

    Returns:
        Number of bits, ``(channels,)``, int64.
    """
    magnitude = torch.maximum(high, -low - 1).double()
    bits = torch.where(magnitude < 1, 0, torch.frexp(magnitude).exponent.long()) + 1
    return torch.where((low == 0) & (high == 0), 0, bits)
