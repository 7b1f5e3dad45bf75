"""Rules of elementwise operations, which tie equal positions; a trial run shows whether they map zero to zero."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from lightning_selfcompress.channels.atoms import Axis, Flags
from lightning_selfcompress.channels.call import Call, Result, Rule, name_of
from lightning_selfcompress.channels.layout import never_zero

# elementwise operations that some supported versions of torch do not tag as pointwise
UNTAGGED = frozenset(
    (
        *("_prelu_kernel", "celu", "elu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish"),
        *("log_sigmoid_forward", "selu", "softplus", "softshrink", "threshold", "clamp", "clamp_max", "clamp_min"),
        *("_to_copy", "alias", "alias_copy", "copy", "detach", "detach_copy", "lift_fresh_copy"),
        *("conj_physical", "fill", "positive", "real", "zero", "fake_quantize_per_tensor_affine_cachemask"),
        *("complex", "polar", "_conj", "_neg_view"),
    )
)


_ARBITRARY = (-3.25, 1.5, 0.375, 6.5, -0.5, 2.25, -1.125, 4.0)


_zeros: dict[tuple[Any, ...], tuple[bool, bool]] = {}


@cache
def is_pointwise(func: Any) -> bool:
    """Returns whether an operation draws no random numbers and computes each element from those at its position."""
    if isinstance(func, HigherOrderOperator):
        return False
    base = name_of(func).rstrip("_")
    return (torch.Tag.pointwise in func.tags or base in UNTAGGED) and torch.Tag.nondeterministic_seeded not in func.tags


def pointwise(call: Call) -> Result:
    """Handles every elementwise operation that draws no random numbers."""
    operands = call.inputs
    dims = [call.dims(t) for t in operands]
    nought = [call.is_nought(t) for t in operands]

    def zero(known: Flags) -> bool:
        is_zero, is_finite = _on_zeros(call, tuple(a or b for a, b in zip(known.tolist(), nought, strict=True)))
        if not is_finite and call.supposes:
            return False
        if not is_finite and known.any():
            for one in dims:
                for dim in one:
                    call.pin(dim, "is not finite where it is zero")
        return is_zero

    result = call.broadcast(dims, [tuple(t.shape) for t in operands], zero)
    others = [never_zero(result) if tuple(t.shape) == call.shape else None for t in call.outputs[1:]]
    return [result, *others]


def _on_zeros(call: Call, known: tuple[bool, ...]) -> tuple[bool, bool]:
    """Returns whether the result is zero, and whether it is finite, where the operands in ``known`` are zero."""
    scalars = [repr(a) if not isinstance(a, Tensor) else "" for a in (*call.args, *call.kwargs.values())]
    key = (call.func, known, tuple(_kind(t) for t in call.inputs), *call.kwargs, *scalars)
    if key not in _zeros:
        _zeros[key] = _probe(call, known)
    return _zeros[key]


def _kind(tensor: Tensor) -> torch.dtype:
    if tensor.dtype == torch.bool:
        return torch.bool
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else torch.int64


def _probe(call: Call, known: tuple[bool, ...]) -> tuple[bool, bool]:
    operands = iter(enumerate(known))

    def replace(value: Any) -> Any:
        if isinstance(value, Tensor):
            i, is_zero = next(operands)
            kind = _kind(value)
            if is_zero:
                return torch.zeros(8, dtype=kind, device="cpu")
            return _arbitrary_of(torch.float64, i) > 0 if kind == torch.bool else _arbitrary_of(kind, i)
        if isinstance(value, (list, tuple)):
            return type(value)(replace(v) for v in value)
        return value

    args = [replace(a) for a in call.args]
    kwargs = {k: replace(v) for k, v in call.kwargs.items() if k not in ("device", "layout", "pin_memory")}
    try:
        results = call.func(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return False, True
    first = results[0] if isinstance(results, (list, tuple)) else results
    return not bool(first.any()), bool(torch.isfinite(first).all())


def _arbitrary_of(kind: torch.dtype, i: int) -> Tensor:
    """Returns numbers of a dtype, none of them zero, that differ from operand to operand."""
    numbers = torch.tensor(_ARBITRARY, dtype=torch.float64, device="cpu").roll(3 * i)
    return (numbers.sign() * numbers.abs().ceil() if kind == torch.int64 else numbers).to(kind)


def glu(call: Call) -> Result:
    """Handles ``glu``, one half of the input times the sigmoid of the other half: the halves are tied."""
    dims, dim = list(call.dims(call["self"])), call["dim"]
    axis = dims[dim]
    dims[dim] = call.align(axis, 2) if isinstance(axis, Axis) else None
    return [tuple(dims)]


RULES: dict[str, Rule] = {"glu": glu}
