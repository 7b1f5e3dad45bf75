"""Rules of operations that move values from one position or dimension to another."""

import numpy as np
from torch import Tensor

from lightning_selfcompress.channels.atoms import UNIFORM, Axis, Dim, Dims, fixed, join
from lightning_selfcompress.channels.call import Call, Result, Rule
from lightning_selfcompress.channels.layout import never_zero


def permute(call: Call) -> Result:
    """Handles ``permute``; its dimensions may be negative."""
    dims = call.dims(call["self"])
    return [tuple(dims[d] for d in call["dims"])]


def transpose(call: Call) -> Result:
    """Handles ``t`` and ``transpose``."""
    dims = list(call.dims(call["self"]))
    if len(dims) > 1:
        one, other = (0, 1) if call.name in ("t", "t_") else (call["dim0"], call["dim1"])
        dims[one], dims[other] = dims[other], dims[one]
    return [tuple(dims)]


def unsqueeze(call: Call) -> Result:
    """Handles ``unsqueeze``."""
    dims, at = list(call.dims(call["self"])), call["dim"]
    dims.insert(at if at >= 0 else at + len(dims) + 1, None)
    return [tuple(dims)]


def squeeze(call: Call) -> Result:
    """Handles ``squeeze``: dimensions of size 1 hold no channels, and all other dimensions are matched in order."""
    if call.name == "squeeze_":
        return call.pin_all("changes the shape in place")
    dims = iter([d for d, n in zip(call.dims(call["self"]), call["self"].shape, strict=True) if n != 1])
    return [tuple(next(dims) if n != 1 else None for n in call.shape)]


def expand(call: Call) -> Result:
    """Handles ``expand``: an expanded dimension is uniform."""
    source: Tensor = call["self"]
    new = len(call.shape) - source.dim()
    dims, sizes = (None,) * new + call.dims(source), (1,) * new + tuple(source.shape)
    return [tuple(UNIFORM if n == 1 < m else d for d, n, m in zip(dims, sizes, call.shape, strict=True))]


def repeat(call: Call) -> Result:
    """Handles ``repeat``: the channels along a dimension are repeated as a whole."""
    source: Tensor = call["self"]
    new = len(call.shape) - source.dim()
    dims, sizes = (None,) * new + call.dims(source), (1,) * new + tuple(source.shape)
    result: list[Dim] = []
    for dim, n, m in zip(dims, sizes, call.shape, strict=True):
        result.append(dim.tile(m // n) if isinstance(dim, Axis) else UNIFORM if n == 1 < m else dim)
    return [tuple(result)]


def flip(call: Call) -> Result:
    """Handles ``flip``: the channels are the same in reverse order."""
    dims = list(call.dims(call["self"]))
    for d in call["dims"]:
        axis = dims[d]
        dims[d] = axis[::-1] if isinstance(axis, Axis) else axis
    return [tuple(dims)]


def roll(call: Call) -> Result:
    """Handles ``roll``: it pins the rolled dimensions and keeps the others."""
    dims = list(call.dims(call["self"]))
    for d in call["dims"] or range(len(dims)):
        call.pin(dims[d], "moves its channels by a number of positions")
        dims[d] = None
    return [tuple(dims)]


def select(call: Call) -> Result:
    """Handles ``select`` and ``unbind``: channels that are picked by number are pinned."""
    dims = list(call.dims(call["self"]))
    call.pin(dims[call["dim"]], "picks a channel by its number")
    del dims[call["dim"]]
    return [tuple(dims)] * len(call.outputs)


def slices(call: Call) -> Result:
    """Handles ``slice``: a slice that is one of several equal parts ties the parts, any other proper slice pins."""
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
    """Handles ``split`` and ``chunk``: equal parts are tied, while unequal parts and parts of size 1 are pinned."""
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
    """Handles ``cat``: it joins the channels along one dimension; along the others, equal positions are tied."""
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
    """Handles ``stack``: equal positions are tied, and the new dimension has no channels."""
    tensors: list[Tensor] = call["tensors"]
    joined = call.broadcast(
        [call.dims(t) for t in tensors], [tuple(t.shape) for t in tensors], lambda known: bool(known.all())
    )
    at = call["dim"] % (len(joined) + 1)
    return [(*joined[:at], None, *joined[at:])]


def constant_pad(call: Call) -> Result:
    """Handles ``constant_pad_nd``: the padding belongs to no channel, and negative padding pins."""
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
    """Handles ``pixel_shuffle``: the input channels of one output channel are tied."""
    dims, factor = call.dims(call["self"]), call["upscale_factor"]
    axis = dims[-3]
    _space(call, dims[-2:])
    if not isinstance(axis, Axis):
        return [(*dims[:-3], None, None, None)]
    return [(*dims[:-3], _joined(call, axis, factor**2), None, None)]


def pixel_unshuffle(call: Call) -> Result:
    """Handles ``pixel_unshuffle``: every input channel becomes several output channels."""
    dims, factor = call.dims(call["self"]), call["downscale_factor"]
    _space(call, dims[-2:])
    axis = dims[-3]
    return [(*dims[:-3], axis.repeat(factor**2) if isinstance(axis, Axis) else None, None, None)]


def channel_shuffle(call: Call) -> Result:
    """Handles ``channel_shuffle``: the groups are tied to each other."""
    dims, groups = list(call.dims(call["self"])), call["groups"]
    axis = dims[1]
    if isinstance(axis, Axis):
        order = np.arange(len(axis)).reshape(groups, -1).T.ravel()
        dims[1] = axis[order].with_zero(call.align(axis, groups).repeat(groups).zero)
    return [tuple(dims)]


def _space(call: Call, dims: Dims) -> None:
    for dim in dims:
        call.pin(dim, "takes its channels for positions in space")


def unfold(call: Call) -> Result:
    """Handles ``Tensor.unfold``: it pins the dimension along which the window slides."""
    dims, dim = list(call.dims(call["self"])), call["dimension"]
    call.pin(dims[dim], "slides over its channels")
    dims[dim] = None
    return [(*dims, None)]


def im2col(call: Call) -> Result:
    """Handles ``F.unfold``: every channel is repeated for each position in the window."""
    dims, window = call.dims(call["self"]), int(np.prod(call["kernel_size"]))
    _space(call, dims[-2:])
    axis = dims[-3]
    return [(*dims[:-3], axis.repeat(window) if isinstance(axis, Axis) else None, None)]


def col2im(call: Call) -> Result:
    """Handles ``F.fold``, which sums windows: the positions in the window of each channel are tied."""
    dims, window = call.dims(call["self"]), int(np.prod(call["kernel_size"]))
    call.pin(dims[-1], "takes its channels for positions in space")
    axis = dims[-2]
    return [(*dims[:-2], _joined(call, axis, window) if isinstance(axis, Axis) else None, None, None)]


def _joined(call: Call, axis: Axis, count: int) -> Axis:
    """Ties every ``count`` channels in a row; the result has one position for them, zero where all are."""
    rows = axis.atoms.reshape(-1, count)
    for column in rows.T[1:]:
        call.tie(rows[:, 0], column)
    return Axis(rows[:, 0], np.asarray(axis.zero.reshape(-1, count).all(1)))


def view_as_complex(call: Call) -> Result:
    """Handles ``view_as_complex``: the last dimension, of real and imaginary parts, goes."""
    dims = call.dims(call["self"])
    call.pin(dims[-1], "takes its channels for real and imaginary parts")
    return [dims[:-1]]


def view_as_real(call: Call) -> Result:
    """Handles ``view_as_real``: a last dimension comes, of real and imaginary parts."""
    return [(*call.dims(call["self"]), None)]


def triangle(call: Call) -> Result:
    """Handles ``tril`` and ``triu``: they pin the rows and columns, and keep zeros along the other dimensions."""
    dims = call.dims(call["self"])
    for dim in dims[-2:]:
        call.pin(dim, "takes its channels for positions")
    return [(*dims[:-2], None, None)]


def as_strided(call: Call) -> Result:
    """Handles ``as_strided`` with unchanged shape, as torch calls it to normalize strides; any other call pins."""
    tensor: Tensor = call["self"]
    dims, shape = call.dims(tensor), tuple(tensor.shape)
    given = [s for s, n in zip(call["stride"], call["size"], strict=True) if n > 1]
    own = [s for s, n in zip(tensor.stride(), shape, strict=True) if n > 1]
    if tuple(call["size"]) == shape and given == own and call["storage_offset"] in (None, tensor.storage_offset()):
        return [dims]
    return call.pin_all("looks at memory in another shape")


# the rules of these operations also apply to tensors without known channels
SPREADING = frozenset({"expand", "repeat", "bernoulli_"})


# operations whose results are written to one by one, as torch does with the gates of recurrent layers
APART = ("unsafe_split", "unsafe_split_with_sizes")


RULES: dict[str, Rule] = {
    "as_strided": as_strided,
    **dict.fromkeys(("t", "transpose"), transpose),
    **dict.fromkeys(("split", "split_with_sizes", *APART), split),
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
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(("tril", "triu"), triangle),
}
