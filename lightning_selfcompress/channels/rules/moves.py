"""Rules of operations that move values: what lay along one dimension lies along another one afterwards."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_selfcompress.channels.atoms import UNIFORM, Axis, Dim, Dims, fixed, join
from lightning_selfcompress.channels.call import Call, Result, Rule, never_zero


def reshape(call: Call) -> Result:
    """``view`` and its kin: dimensions are matched in blocks of equal size, see :func:`_reshape_block`."""
    source = call.inputs[0]
    dims, sizes, target = call.dims(source), tuple(source.shape), call.shape
    result: list[Dim] = [None] * len(target)
    for ins, outs in _blocks(sizes, target):
        block = _reshape_block(call, [dims[i] for i in ins], [sizes[i] for i in ins], [target[o] for o in outs])
        for o, dim in zip(outs, block, strict=True):
            result[o] = dim
    return [tuple(result)]


def _blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest matching of dimensions, larger than 1, of two shapes into blocks of equal size."""
    ins = [i for i, n in enumerate(source) if n != 1]
    outs = [o for o, n in enumerate(target) if n != 1]
    blocks, i, o = [], 0, 0
    while i < len(ins) and o < len(outs):
        left, right = [ins[i]], [outs[o]]
        n, m = source[ins[i]], target[outs[o]]
        while n != m:
            if n < m:
                i += 1
                left.append(ins[i])
                n *= source[ins[i]]
            else:
                o += 1
                right.append(outs[o])
                m *= target[outs[o]]
        blocks.append((left, right))
        i, o = i + 1, o + 1
    return blocks


def _reshape_block(call: Call, dims: list[Dim], sizes: list[int], target: list[int]) -> list[Dim]:
    """Splits and merges within one block.

    Where the channels vary along exactly one dimension of the target this is exact. Where they vary along several, as
    in a view to (groups, channels per group), they are tied across all but the largest of these: that is the one whose
    size is taken to depend on how many channels there are. Only a dry run can tell.
    """
    if len(dims) == 1 and len(target) == 1:
        return dims
    axes = [(i, d) for i, d in enumerate(dims) if isinstance(d, Axis)]
    if not axes:
        return [None] * len(target)
    if len(axes) > 1:
        for _, axis in axes:
            call.pin_or_owe(axis, "merges channels of two dimensions")
        return [None] * len(target)
    i, axis = axes[0]
    spread = tuple(-1 if j == i else 1 for j in range(len(sizes)))
    atoms = np.broadcast_to(axis.atoms.reshape(spread), sizes).reshape(target)
    zero = np.broadcast_to(axis.zero.reshape(spread), sizes).reshape(target)
    varies = [j for j, n in enumerate(target) if n > 1 and (atoms != atoms.take([0], j)).any()]
    if not varies:
        call.pin(axis, "splits a single channel")
        return [None] * len(target)
    chosen = max(varies, key=lambda j: (target[j], j))
    rows = np.moveaxis(atoms, chosen, -1).reshape(-1, target[chosen])
    for row in rows[1:] if len(varies) > 1 else ():
        call.tie(rows[0], row)
    kept = np.asarray(np.moveaxis(zero, chosen, -1).reshape(-1, target[chosen]).all(0))
    return [Axis(rows[0], kept) if j == chosen else None for j in range(len(target))]


def permute(call: Call) -> Result:
    """``permute``, with negative dimensions too."""
    dims = call.dims(call["self"])
    return [tuple(dims[d] for d in call["dims"])]


def transpose(call: Call) -> Result:
    """``t``, ``transpose``."""
    dims = list(call.dims(call["self"]))
    if len(dims) > 1:
        one, other = (0, 1) if call.name in ("t", "t_") else (call["dim0"], call["dim1"])
        dims[one], dims[other] = dims[other], dims[one]
    return [tuple(dims)]


def unsqueeze(call: Call) -> Result:
    """``unsqueeze``."""
    dims, at = list(call.dims(call["self"])), call["dim"]
    dims.insert(at if at >= 0 else at + len(dims) + 1, None)
    return [tuple(dims)]


def squeeze(call: Call) -> Result:
    """``squeeze``: dimensions of size 1 hold no channels, so the others are matched in order."""
    if call.name == "squeeze_":
        return call.pin_all("changes the shape in place")
    dims = iter([d for d, n in zip(call.dims(call["self"]), call["self"].shape, strict=True) if n != 1])
    return [tuple(next(dims) if n != 1 else None for n in call.shape)]


def expand(call: Call) -> Result:
    """``expand``: what was one value is now the same everywhere."""
    source: Tensor = call["self"]
    new = len(call.shape) - source.dim()
    dims, sizes = (None,) * new + call.dims(source), (1,) * new + tuple(source.shape)
    return [tuple(UNIFORM if n == 1 < m else d for d, n, m in zip(dims, sizes, call.shape, strict=True))]


def repeat(call: Call) -> Result:
    """``repeat``: channels several times over."""
    source: Tensor = call["self"]
    new = len(call.shape) - source.dim()
    dims, sizes = (None,) * new + call.dims(source), (1,) * new + tuple(source.shape)
    result: list[Dim] = []
    for dim, n, m in zip(dims, sizes, call.shape, strict=True):
        result.append(dim.tile(m // n) if isinstance(dim, Axis) else UNIFORM if n == 1 < m else dim)
    return [tuple(result)]


def flip(call: Call) -> Result:
    """``flip``: the same channels, in reverse."""
    dims = list(call.dims(call["self"]))
    for d in call["dims"]:
        axis = dims[d]
        dims[d] = axis[::-1] if isinstance(axis, Axis) else axis
    return [tuple(dims)]


def roll(call: Call) -> Result:
    """``roll``: other dimensions pass."""
    dims = list(call.dims(call["self"]))
    for d in call["dims"] or range(len(dims)):
        call.pin(dims[d], "moves its channels by a number of positions")
        dims[d] = None
    return [tuple(dims)]


def select(call: Call) -> Result:
    """``select`` and ``unbind``: channels picked by their number stay."""
    dims = list(call.dims(call["self"]))
    call.pin(dims[call["dim"]], "picks a channel by its number")
    del dims[call["dim"]]
    return [tuple(dims)] * len(call.outputs)


def slices(call: Call) -> Result:
    """``slice``: all channels, or one of equal stretches of them, which are then tied to each other."""
    source, dim = call["self"], call["dim"]
    dims, size = list(call.dims(source)), source.shape[call["dim"]]
    axis = dims[dim]
    if isinstance(axis, Axis):
        start, stop, step = slice(call["start"], call["end"], call["step"]).indices(size)
        n = stop - start
        if step == 1 and 1 < n < size and size % n == 0 and start % n == 0:
            dims[dim] = call.align(axis, size // n)
        elif (start, n, step) != (0, size, 1):
            call.pin(axis, "takes channels by their numbers")
            dims[dim] = None
    return [tuple(dims)]


def split(call: Call) -> Result:
    """``split``, ``chunk``: equal stretches are tied to each other, others pin."""
    dims, dim = list(call.dims(call["self"])), call["dim"]
    axis = dims[dim]
    if isinstance(axis, Axis):
        sizes = {t.shape[dim] for t in call.outputs}
        if len(sizes) == 1 and sizes != {1}:
            dims[dim] = call.align(axis, len(call.outputs))
        else:
            call.pin(axis, "cuts its channels at given numbers")
            dims[dim] = None
    return [tuple(dims)] * len(call.outputs)


def cat(call: Call) -> Result:
    """``cat``: channels one after the other; along other dimensions equal positions meet."""
    tensors = [t for t in call["tensors"] if not (t.dim() == 1 and t.numel() == 0)]
    if not tensors:
        return [None]
    dim = call["dim"] % tensors[0].dim()
    rows, shapes = [call.dims(t) for t in tensors], [tuple(t.shape) for t in tensors]
    result: list[Dim] = []
    for d in range(len(rows[0])):
        here, sizes = [row[d] for row in rows], [shape[d] for shape in shapes]
        if d != dim:
            result.append(call.meet(here, sizes, zero=lambda known: bool(known.all())))
        elif any(isinstance(x, Axis) for x in here):
            result.append(join([x if isinstance(x, Axis) else fixed(n) for x, n in zip(here, sizes, strict=True)]))
        else:
            result.append(None)
    return [tuple(result)]


def stack(call: Call) -> Result:
    """``stack``: equal positions meet, a dimension is new."""
    tensors: list[Tensor] = call["tensors"]
    joined = call.broadcast(
        [call.dims(t) for t in tensors], [tuple(t.shape) for t in tensors], lambda known: bool(known.all())
    )
    at = call["dim"] % (len(joined) + 1)
    return [(*joined[:at], None, *joined[at:])]


def constant_pad(call: Call) -> Result:
    """``constant_pad_nd``: padding belongs to no channel."""
    dims, pad = list(call.dims(call["self"])), call["pad"]
    for k in range(len(pad) // 2):
        axis, (before, after) = dims[-1 - k], pad[2 * k : 2 * k + 2]
        if (before, after) == (0, 0):
            continue
        dims[-1 - k] = None
        if call["value"] != 0:
            dims = [*never_zero(tuple(dims))]
        if isinstance(axis, Axis) and min(before, after) >= 0:
            dims[-1 - k] = join([fixed(before), axis, fixed(after)])
        else:
            call.pin(axis, "cuts off channels")
    return [tuple(dims)]


def pixel_shuffle(call: Call) -> Result:
    """``pixel_shuffle``: the channels of one output channel go together."""
    dims, factor = call.dims(call["self"]), call["upscale_factor"]
    axis = dims[-3]
    _space(call, dims[-2:])
    if not isinstance(axis, Axis):
        return [(*dims[:-3], None, None, None)]
    rows = axis.atoms.reshape(-1, factor**2)
    for column in rows.T[1:]:
        call.tie(rows[:, 0], column)
    zero = np.asarray(axis.zero.reshape(-1, factor**2).all(1))
    return [(*dims[:-3], Axis(rows[:, 0], zero), None, None)]


def pixel_unshuffle(call: Call) -> Result:
    """``pixel_unshuffle``: every channel becomes several."""
    dims, factor = call.dims(call["self"]), call["downscale_factor"]
    _space(call, dims[-2:])
    axis = dims[-3]
    return [(*dims[:-3], axis.repeat(factor**2) if isinstance(axis, Axis) else None, None, None)]


def channel_shuffle(call: Call) -> Result:
    """``channel_shuffle``: the groups are tied to each other."""
    dims, groups = list(call.dims(call["self"])), call["groups"]
    axis = dims[1]
    if isinstance(axis, Axis):
        order = np.arange(len(axis)).reshape(groups, -1).T.ravel()
        dims[1] = axis[order].with_zero(call.align(axis, groups).repeat(groups).zero)
    return [tuple(dims)]


def _space(call: Call, dims: Dims) -> None:
    for dim in dims:
        call.pin(dim, "takes its channels for positions in space")


def index(call: Call) -> Result:
    """``x[..., indices, ...]``: the dimensions that are indexed pin, the others pass."""
    dims = list(call.dims(call["self"]))
    given = [*call["indices"], *[None] * len(dims)]
    places, kept, used = [], [], 0
    for entry in given:
        width = entry.dim() if entry is not None and entry.dtype.is_floating_point is False and _is_mask(entry) else 1
        if used >= len(dims):
            break
        for dim in dims[used : used + width]:
            if entry is None:
                kept.append(dim)
            else:
                call.pin(dim, "picks channels by their numbers")
        if entry is not None:
            places.append(len(kept))
        used += width
    _pin_indices(call)
    new = len(call.shape) - len(kept)
    together = len(set(places)) == 1
    at = places[0] if together else 0
    return [(*kept[:at], *[None] * new, *kept[at:])]


def _pin_indices(call: Call) -> None:
    for tensor in call.inputs[1:]:
        for dim in call.dims(tensor):
            call.pin(dim, "takes its channels for numbers of others")


def _is_mask(entry: Tensor) -> bool:
    return str(entry.dtype) in ("torch.bool", "torch.uint8")


def index_select(call: Call) -> Result:
    """``index_select``: the dimension that is indexed pins, the others pass."""
    dims = list(call.dims(call["self"]))
    call.pin(dims[call["dim"]], "picks channels by their numbers")
    _pin_indices(call)
    dims[call["dim"]] = None
    return [tuple(dims)]


def unfold(call: Call) -> Result:
    """``Tensor.unfold``: windows along a dimension that holds no channels."""
    dims, dim = list(call.dims(call["self"])), call["dimension"]
    call.pin(dims[dim], "slides over its channels")
    dims[dim] = None
    return [(*dims, None)]


def im2col(call: Call) -> Result:
    """``F.unfold``: every channel becomes one for each position of the window."""
    dims, window = call.dims(call["self"]), int(np.prod(call["kernel_size"]))
    _space(call, dims[-2:])
    axis = dims[-3]
    return [(*dims[:-3], axis.repeat(window) if isinstance(axis, Axis) else None, None)]


def as_strided(call: Call) -> Result:
    """``as_strided`` to the shape there is, as torch does to normalize strides; everything else pins."""
    tensor: Tensor = call["self"]
    dims, shape = call.dims(tensor), tuple(tensor.shape)
    given = [s for s, n in zip(call["stride"], call["size"], strict=True) if n > 1]
    own = [s for s, n in zip(tensor.stride(), shape, strict=True) if n > 1]
    if tuple(call["size"]) == shape and given == own and call["storage_offset"] in (None, tensor.storage_offset()):
        return [dims]
    return call.pin_all("looks at memory in another shape")


# these say something of tensors that have no channels, too
SPREAD = frozenset({"expand", "repeat", "bernoulli_"})


RULES: dict[str, Rule] = {
    "as_strided": as_strided,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "view_copy"), reshape),
    **dict.fromkeys(("t", "transpose"), transpose),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), split),
    **dict.fromkeys(("select", "unbind"), select),
    "permute": permute,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "repeat": repeat,
    "flip": flip,
    "roll": roll,
    "slice": slices,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": constant_pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "index": index,
    "index_select": index_select,
    "unfold": unfold,
    "im2col": im2col,
}
