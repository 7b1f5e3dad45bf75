"""Rules of operations that read or write entries by their numbers, or under a mask.

The dimension along which entries are numbered is pinned; along all others, equal positions are tied.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_selfcompress.channels.atoms import UNIFORM, Axis, Dim, Flags
from lightning_selfcompress.channels.call import Call, Result, Rule

_BY_NUMBER = "picks channels by their numbers"


_NUMBERS = "takes its channels for numbers of others"


def index(call: Call) -> Result:
    """Handles ``x[..., indices, ...]``: it pins the indexed dimensions and keeps the others."""
    dims = call.dims(call["self"])
    kept, picked, new, at = _places(call["indices"], len(dims))
    for d in picked:
        call.pin(dims[d], _BY_NUMBER)
    _pin_all(call, call.inputs[1:], _NUMBERS)
    rest = [dims[d] for d in kept]
    return [(*rest[:at], *[None] * new, *rest[at:])]


def _places(indices: Sequence[Tensor | None], rank: int) -> tuple[list[int], list[int], int, int]:
    """Returns how the dimensions of a tensor lie after it was indexed.

    Args:
        indices: Numbers or a mask for some dimensions, None for others; a mask stands for as many as it has.
        rank: Number of dimensions of the tensor.

    Returns:
        The dimensions that are kept, those that are picked from, the number of dimensions that take their place, and
        the position of these among the kept ones.
    """
    kept: list[int] = []
    picked: list[int] = []
    places: list[int] = []
    used, new = 0, 0
    for entry in indices:
        width = entry.dim() if entry is not None and _is_mask(entry) else 1
        (kept if entry is None else picked).extend(range(used, used + width))
        if entry is not None:
            places.append(len(kept))
            new = max(new, 1 if _is_mask(entry) else entry.dim())
        used += width
    kept.extend(range(used, rank))
    return kept, picked, new, places[0] if len(set(places)) == 1 else 0


def _is_mask(entry: Tensor) -> bool:
    return entry.dtype in (torch.bool, torch.uint8)


def _pin_all(call: Call, tensors: Sequence[Tensor], text: str) -> None:
    for tensor in tensors:
        for dim in call.dims(tensor):
            call.pin(dim, text)


def index_put(call: Call) -> Result:
    """Handles ``x[..., indices, ...] = values``, where a mask may be a mask of channels, too."""
    tensor, values, indices = call["self"], call["values"], call["indices"]
    dims, shape = list(call.dims(tensor)), tuple(tensor.shape)
    kept, picked, new, at = _places(indices, len(dims))
    rank = len(kept) + new
    written: list[Dim] = [None] * (rank - values.dim()) + list(call.dims(values))
    sizes = (1,) * (rank - values.dim()) + tuple(values.shape)
    given = [entry for entry in indices if entry is not None]
    is_nought = call.is_nought(values)

    def stays_zero(known: Flags) -> bool:
        return bool(known[0]) and (bool(known[1]) or is_nought)

    for place, d in enumerate(kept):
        j = place if place < at else place + new
        dims[d] = call.meet([dims[d], written[j]], [shape[d], sizes[j]], zero=stays_zero)
    if len(given) == 1 and _is_mask(given[0]) and sizes[at] == 1:  # one value wherever the mask is set
        for d, dim, size in zip(picked, call.dims(given[0]), given[0].shape, strict=True):
            dims[d] = call.meet([dims[d], dim], [shape[d], size], zero=stays_zero)
        return [tuple(dims)]
    for d in picked:
        dims[d] = _pinned(call, dims[d], _BY_NUMBER)
    for dim in written[at : at + new]:
        call.pin(dim, _NUMBERS)
    _pin_all(call, given, _NUMBERS)
    return [tuple(dims)]


def _pinned(call: Call, dim: Dim, text: str) -> Dim:
    """Pins a dimension and returns it, since views of the memory that is written to have the same channels."""
    call.pin(dim, text)
    return dim if isinstance(dim, Axis) else None


def _both(known: Flags) -> bool:
    return bool(known.all())


def index_select(call: Call) -> Result:
    """Handles ``index_select``: it pins the indexed dimension and keeps the others."""
    dims = list(call.dims(call["self"]))
    if not dims:
        return [()]
    call.pin(dims[call["dim"]], _BY_NUMBER)
    _pin_all(call, call.inputs[1:], _NUMBERS)
    dims[call["dim"]] = None
    return [tuple(dims)]


def index_add(call: Call) -> Result:
    """Handles ``index_add``, ``index_copy``, ``index_reduce`` and ``index_fill``, which write whole slices."""
    source = call.get("source")
    source = call.get("value") if source is None else source
    _pin_all(call, [call["index"]], _NUMBERS)
    if isinstance(source, Tensor):
        return [_written(call, [source], _both)]
    return [_written(call, [], lambda known: bool(known[0]) and source == 0)]


def _written(call: Call, others: Sequence[Tensor], zero: Callable[[Flags], bool]) -> tuple[Dim, ...]:
    """Returns the dimensions of a tensor after values were written to it along one of its dimensions.

    Args:
        call: The operation.
        others: Further tensors that are aligned with the tensor, of the same rank or without dimensions.
        zero: A function from whether the tensor and the others are zero to whether the result is.
    """
    tensor = call["self"]
    dims, rank = list(call.dims(tensor)), tensor.dim()
    rows = [call.dims(t) or (None,) * rank for t in others]
    sizes = [tuple(t.shape) or (1,) * rank for t in others]
    for d in range(rank):
        here, there = [dims[d], *(row[d] for row in rows)], [tensor.shape[d], *(size[d] for size in sizes)]
        if d == call["dim"] % rank or any(n not in (1, there[0]) for n in there):
            for dim in here[1:]:
                call.pin(dim, _BY_NUMBER)
            dims[d] = _pinned(call, dims[d], _BY_NUMBER)
        else:
            dims[d] = call.meet(here, there, zero=zero)
    return tuple(dims)


def scatter(call: Call) -> Result:
    """Handles ``scatter``, ``scatter_add`` and ``scatter_reduce``, whose index has a number for each written value."""
    index, source, value = call["index"], call.get("src"), call.get("value")
    if any(n != m for d, (n, m) in enumerate(zip(index.shape, call.shape, strict=False)) if d != _dim(call)):
        return _pinned_result(call, "writes to the first of its channels")
    if isinstance(source, Tensor):
        return [_written(call, [index, source], lambda known: bool(known[0] and known[2]))]
    return [_written(call, [index], lambda known: bool(known[0]) and value == 0)]


def _dim(call: Call) -> int:
    tensor: Tensor = call["self"]
    dim: int = call["dim"]
    return dim % max(tensor.dim(), 1)


def _pinned_result(call: Call, text: str) -> Result:
    dims = call.dims(call["self"])
    call.pin_all(text)
    return [tuple(d if isinstance(d, Axis) else None for d in dims)]


def gather(call: Call) -> Result:
    """Handles ``gather``: it pins the dimension along which it picks; along others the numbers belong to channels."""
    tensor, numbers = call["self"], call["index"]
    result: list[Dim] = []
    pairs = zip(call.dims(tensor), call.dims(numbers), tensor.shape, numbers.shape, strict=True)
    for d, (dim, other, n, m) in enumerate(pairs):
        if d == _dim(call) or n != m:
            call.pin(dim, _BY_NUMBER)
            call.pin(other, _NUMBERS)
            result.append(None)
        else:
            result.append(call.meet([dim, other], [n, m], zero=lambda known: bool(known[0])))
    return [tuple(result)]


def masked_scatter(call: Call) -> Result:
    """Handles ``masked_scatter`` of whole rows: the last dimension is that of the source. Any other mask pins."""
    tensor, mask, source = call["self"], call["mask"], call["source"]
    if not _is_of_rows(call, tensor, mask) or source.dim() < 2 or source.shape[-1] != tensor.shape[-1]:
        return _pinned_result(call, "writes to single entries of rows")
    rows = [call.dims(tensor), call.dims(source)]
    last = call.meet([row[-1] for row in rows], [tensor.shape[-1]] * 2, zero=_both)
    for dim in (*rows[1][:-1], *call.dims(mask)[:-1]):
        call.pin(dim, _BY_NUMBER)
    return [(*(_pinned(call, dim, _BY_NUMBER) for dim in rows[0][:-1]), last)]


def masked_select(call: Call) -> Result:
    """Handles ``masked_select`` of whole rows, which lie one after the other. Any other mask pins."""
    tensor, mask = call["self"], call["mask"]
    last = call.dims(tensor)[-1] if tensor.dim() else None
    if not isinstance(last, Axis) or not _is_of_rows(call, tensor, mask) or mask.dim() > tensor.dim():
        return call.pin_all("picks single entries of rows")
    for dim in (*call.dims(tensor)[:-1], *call.dims(mask)[:-1]):
        call.pin(dim, _BY_NUMBER)
    return [(last.tile(call.shape[0] // len(last)),)]


def _is_of_rows(call: Call, tensor: Tensor, mask: Tensor) -> bool:
    """Returns whether a mask is the same at all positions along the last dimension of a tensor."""
    return tensor.dim() > 0 and (not mask.dim() or mask.shape[-1] == 1 or call.dims(mask)[-1] is UNIFORM)


def slice_scatter(call: Call) -> Result:
    """Handles ``slice_scatter`` and ``select_scatter``, which write a slice into a copy."""
    source: Tensor = call["src"]
    dims, sizes = list(call.dims(source)), list(source.shape)
    if call.name == "select_scatter":
        dims.insert(_dim(call), None)
        sizes.insert(_dim(call), 1)
    own, shape = list(call.dims(call["self"])), call.shape
    for d, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
        if d == _dim(call):
            call.pin(dim, _BY_NUMBER)
            own[d] = _pinned(call, own[d], _BY_NUMBER)
        else:
            own[d] = call.meet([own[d], dim], [shape[d], size], zero=_both)
    return [tuple(own)]


def segment_reduce(call: Call) -> Result:
    """Handles ``segment_reduce``: it pins the dimension of the segments, and those before it."""
    data, axis, initial = call["data"], call["axis"], call["initial"]
    dims = call.dims(data)
    for dim in dims[: axis % len(dims) + 1]:
        call.pin(dim, "takes its channels for members of segments")
    _pin_all(call, call.inputs[1:], _NUMBERS)
    rest = dims[axis % len(dims) + 1 :]
    zero = initial == 0 if initial is not None else call["reduce"] in ("sum", "mean")  # what an empty segment yields
    kept: list[Any] = [d if zero or not isinstance(d, Axis) else d.with_zero(False) for d in rest]
    return [(*[None] * (len(dims) - len(rest)), *kept)]


def packed_sequence(call: Call) -> Result:
    """Handles ``_pack_padded_sequence``, which puts steps of different sequences one after the other."""
    dims = call.dims(call["input"])
    for dim in (*dims[:2], *call.dims(call["lengths"])):
        call.pin(dim, "takes its channels for steps")
    return [(None, *dims[2:]), (None,)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "_index_put_impl_", "_unsafe_index_put"), index_put),
    "index_select": index_select,
    **dict.fromkeys(("index_add", "index_copy", "index_reduce", "index_fill"), index_add),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    "gather": gather,
    "masked_scatter": masked_scatter,
    "masked_select": masked_select,
    **dict.fromkeys(("slice_scatter", "select_scatter"), slice_scatter),
    "segment_reduce": segment_reduce,
    "_pack_padded_sequence": packed_sequence,
}
