"""Rules of operations that combine positions: normalization, pooling, softmax and reductions."""

import numpy as np
from torch import Tensor

from lightning_selfcompress.channels.atoms import Axis, Dim, Dims, Flags
from lightning_selfcompress.channels.call import NEEDS_ALL, Call, Result, Rule
from lightning_selfcompress.channels.layout import never_zero


def batch_norm(call: Call) -> Result:
    """Handles batch normalization: every channel is tied to its scale, shift and running statistics."""
    dims = list(call.dims(call["input"]))
    for d in (0, *range(2, len(dims))):
        call.pin(dims[d], "normalizes over it")
    joined = _normalized(call, dims[1], ("weight", "bias", "running_mean", "running_var"))
    return [(None, joined, *[None] * len(dims[2:])), *[None] * (len(call.outputs) - 1)]


def _normalized(call: Call, channels: Dim, names: tuple[str, ...]) -> Dim:
    """Returns the channels after their normalization.

    A channel is zero where its shift is zero, and either its scale is zero or its input and running mean both are.
    """
    given = {name: call[name] for name in names if call[name] is not None}
    size = call["input"].shape[1]

    def zero(known: Flags) -> bool:
        of: dict[str, bool] = dict(zip(("input", *given), known.tolist(), strict=True))
        return (of.get("weight", False) or (of["input"] and of.get("running_mean", True))) and of.get("bias", True)

    rows = [channels, *(call.dims(t)[0] for t in given.values())]
    return call.meet(rows, [size] * len(rows), zero=zero)


def layer_norm(call: Call) -> Result:
    """Handles layer normalization: it pins the dimensions that it normalizes over, with its scale and shift.

    The result has the same channels, so that whatever it is combined with stays for the same reason.
    """
    dims, n = call.dims(call["input"]), len(call["normalized_shape"])
    for dim in dims[-n:]:
        call.pin(dim)
    for name in ("weight", "bias"):
        tensor = call.get(name)
        for dim in call.dims(tensor) if tensor is not None else ():
            call.pin(dim)
    others = dims[:-n] if call.get("bias") is None else never_zero(dims[:-n])
    return [(*others, *never_zero(dims[-n:])), *[None] * (len(call.outputs) - 1)]


def group_norm(call: Call) -> Result:
    """Handles group normalization: the channels of each group are tied."""
    dims, groups = call.dims(call["input"]), call["group"]
    for dim in dims[2:]:
        call.pin(dim, "normalizes over it")
    size = call["input"].shape[1]
    joined = _normalized(call, dims[1], ("weight", "bias"))
    if isinstance(joined, Axis) and size > groups:
        members = joined.atoms.reshape(groups, -1)
        for column in members.T[1:]:
            call.tie(members[:, 0], column)
        joined = joined.with_zero(np.repeat(joined.zero.reshape(groups, -1).all(1), size // groups))
    batch = dims[:1] if call["bias"] is None else never_zero(dims[:1])
    return [(*batch, joined, *[None] * len(dims[2:])), *[None] * (len(call.outputs) - 1)]


def softmax(call: Call) -> Result:
    """Handles softmax: it pins the dimension that it normalizes over, and no result is known to be zero."""
    dims = list(call.dims(call["self"]))
    call.pin(dims[call["dim"]])
    dims[call["dim"]] = None
    return [never_zero(tuple(dims))]


def spatial(count: int) -> Rule:
    """Returns the rule of pooling, interpolation and padding over the last ``count`` dimensions, which keeps zeros."""

    def rule(call: Call) -> Result:
        source, *others = call.inputs
        dims = call.dims(source)
        for dim in (*dims[-count:], *(d for t in others for d in call.dims(t))):
            call.pin(dim, "takes its channels for positions in space")
        result: Dims = (*dims[:-count], *[None] * count)
        return _values_and_indices(call, result)

    return rule


def _values_and_indices(call: Call, dims: Dims) -> Result:
    """Gives all outputs the same dimensions; those of whole numbers are not known to be zero."""
    return [dims if t.is_floating_point() or t.is_complex() else never_zero(dims) for t in call.outputs]


ALONG_KEEP_ZERO = ("cumsum", "cumprod", "cummax", "cummin", "sort", "topk")


ALONG = (*ALONG_KEEP_ZERO, "logcumsumexp")


_NORMS = ("norm", "linalg_vector_norm")


REDUCE_KEEP_ZERO = (
    *("sum", "nansum", "mean", "amax", "amin", "max", "min", "aminmax", "prod", "var", "std", "var_mean", "std_mean"),
    *("median", "nanmedian", "mode", "kthvalue", *_NORMS),
)


REDUCE = (*REDUCE_KEEP_ZERO, "logsumexp", "argmax", "argmin", "all", "any", "count_nonzero")


def reduction(call: Call) -> Result:
    """Handles sums, means, norms and extremes: it pins the reduced channels, in sums and norms those not zero if dead.

    A penalty on parameters pins nothing: its outputs owe the reduced atoms, which are pinned once an output meets data.
    """
    tensor: Tensor = call["self"]
    dims = call.dims(tensor)
    reduced = reduced_dims(call, tensor.dim())
    call.reduces = True
    for d in reduced:
        if call.name in ("sum", "nansum"):
            call.sum_over(dims[d])
        elif call.name in _NORMS and _order(call) > 0:  # zeros do not count in it
            call.sum_over(dims[d], NEEDS_ALL)
        else:
            call.pin_or_owe(dims[d])
    keepdim = bool(call.get("keepdim"))
    kept = tuple(None if d in reduced else dim for d, dim in enumerate(dims) if keepdim or d not in reduced)
    return _values_and_indices(call, kept if call.name in REDUCE_KEEP_ZERO else never_zero(kept))


def _order(call: Call) -> float:
    """Returns the order of a norm, 2 if none is given."""
    order = call["ord" if call.name == "linalg_vector_norm" else "p"]
    return 2.0 if order is None else float(order)


def reduced_dims(call: Call, rank: int) -> set[int]:
    """Returns the dimensions that a reduction of a tensor of ``rank`` dimensions reduces."""
    dim = call.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return set(range(rank))
    return {d % rank for d in ([dim] if isinstance(dim, int) else dim)} if rank else set()


def along(call: Call) -> Result:
    """Handles running sums, products and extremes, and sorting: it pins the dimension along which they run."""
    dims = list(call.dims(call["self"]))
    for d in reduced_dims(call, len(dims)):
        call.pin(dims[d])
        dims[d] = None
    return _values_and_indices(call, tuple(dims) if call.name in ALONG_KEEP_ZERO else never_zero(tuple(dims)))


def fourier(call: Call) -> Result:
    """Handles Fourier transforms: they pin the transformed dimensions, and keep zeros along the others."""
    dims = list(call.dims(call["self"]))
    for d in call["dim"]:
        call.pin(dims[d])
        dims[d] = None
    return [tuple(dims)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), fourier),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "_batch_norm_with_update",
        ),
        batch_norm,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(REDUCE, reduction),
    **dict.fromkeys(ALONG, along),
}


for _n in (1, 2, 3):
    _names = ("upsample_nearest{}d", "_upsample_nearest_exact{}d", "reflection_pad{}d", "replication_pad{}d")
    RULES |= {name.format(_n): spatial(_n) for name in _names}


for _n in (2, 3):
    _names = ("max_pool{}d_with_indices", "avg_pool{}d", "_adaptive_avg_pool{}d", "adaptive_max_pool{}d")
    RULES |= {name.format(_n): spatial(_n) for name in _names}


RULES |= {
    "upsample_linear1d": spatial(1),
    **dict.fromkeys(
        ("max_pool2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "fractional_max_pool2d"),
        spatial(2),
    ),
    "upsample_trilinear3d": spatial(3),
    "grid_sampler_2d": spatial(2),
    "grid_sampler_3d": spatial(3),
}
