"""The rule of reshapes, which split dimensions with channels and merge them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_selfcompress.channels.atoms import FIXED, Atoms, Axis, Dim, Flags
from lightning_selfcompress.channels.call import Call, Result, Rule


def reshape(call: Call) -> Result:
    """Handles ``view`` and the other reshapes, in blocks of dimensions of equal size (:func:`_reshape_block`)."""
    source = call.inputs[0]
    dims, sizes, target = call.dims(source), tuple(source.shape), call.shape
    given = [*(call.get("size") or ())]
    result: list[Dim] = [None] * len(target)
    for ins, outs in blocks(sizes, target):
        left_open = next((j for j, o in enumerate(outs) if o < len(given) and given[o] == -1), None)
        block = _reshape_block(
            call, [dims[i] for i in ins], [sizes[i] for i in ins], [target[o] for o in outs], left_open
        )
        for o, dim in zip(outs, block, strict=True):
            result[o] = dim
    return [tuple(result)]


def blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns the finest matching of the dimensions larger than 1 of two shapes into blocks of equal size."""
    ins = [i for i, n in enumerate(source) if n != 1]
    outs = [o for o, n in enumerate(target) if n != 1]
    matched, i, o = [], 0, 0
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
        matched.append((left, right))
        i, o = i + 1, o + 1
    return matched


def _reshape_block(
    call: Call, dims: list[Dim], sizes: list[int], target: list[int], left_open: int | None
) -> list[Dim]:
    """Splits and merges the dimensions within one block.

    The result is exact where the channels vary along one dimension of the target. Where the channels vary along several
    dimensions, as in a view to (groups, channels per group), the last two of them are the rows and columns of a grid.
    Of these, the one whose size the program left open (-1) depends on the number of channels, otherwise the larger one
    is assumed to. Only a dry run can confirm this assumption.
    """
    if len(dims) == 1 and len(target) == 1:
        return dims
    axes = [(i, d) for i, d in enumerate(dims) if isinstance(d, Axis)]
    if not axes:
        return [None] * len(target)
    merged = _merged(call, axes, sizes)
    if merged is None:
        for _, axis in axes:
            call.pin_or_owe(axis, "merges channels of two dimensions")
        return [None] * len(target)
    atoms, zero = merged[0].reshape(target), merged[1].reshape(target)
    varies = [j for j, n in enumerate(target) if n > 1 and (atoms != atoms.take([0], j)).any()]
    fading = axes[0][1].fading if len(axes) == 1 else frozenset()
    if not varies:
        call.pin(axes[0][1], "splits a single channel")
        return [None] * len(target)
    chosen = left_open if left_open in varies else max(varies, key=lambda j: (target[j], j))
    if len(varies) > 1 and chosen in varies[-2:]:
        return _split(call, atoms, zero, varies, left_open, fading)
    rows = np.moveaxis(atoms, chosen, -1).reshape(-1, target[chosen])
    for row in rows[1:] if len(varies) > 1 else ():
        call.tie(rows[0], row)
    kept = np.asarray(np.moveaxis(zero, chosen, -1).reshape(-1, target[chosen]).all(0))
    return [Axis(rows[0], kept, fading) if j == chosen else None for j in range(len(target))]


def _merged(call: Call, axes: list[tuple[int, Axis]], sizes: list[int]) -> tuple[Atoms, Flags] | None:
    """Returns the atoms and zero flags at every place of several dimensions, or None if these cannot be known.

    Where two dimensions have channels, the places are the cells of a grid.
    """

    def spread(known: NDArray[Any], i: int) -> NDArray[Any]:
        shape = tuple(-1 if j == i else 1 for j in range(len(sizes)))
        return np.broadcast_to(known.reshape(shape), sizes)

    atoms, zeros = zip(*((spread(axis.atoms, i), spread(axis.zero, i)) for i, axis in axes), strict=True)
    if len(axes) == 1:
        return atoms[0], zeros[0]
    if len(axes) > 2 or call.constant is not None or any((a == FIXED).any() for a in atoms):
        return None
    pairs, which = np.unique(np.stack([a.ravel() for a in atoms], 1), axis=0, return_inverse=True)
    rows, columns = pairs.T
    cells = call.grid(call.store.new_of(len(pairs), rows, columns), rows, columns, merges=True)
    return cells[which.reshape(sizes)], zeros[0] & zeros[1]


def _split(
    call: Call, atoms: Atoms, zero: Flags, varies: list[int], left_open: int | None, fading: frozenset[int]
) -> list[Dim]:
    """Makes the last two dimensions along which atoms vary the rows and columns of a grid; all others are tied."""
    last = varies[-2:]
    shape = tuple(atoms.shape[j] for j in last)
    layers, zeros = (np.moveaxis(known, last, (-2, -1)).reshape(-1, *shape) for known in (atoms, zero))
    for layer in layers[1:] if len(varies) > 2 else ():
        call.tie(layers[0].ravel(), layer.ravel())
    _, first, which = np.unique(layers[0][:, 0], return_index=True, return_inverse=True)  # rows may be repeated
    cells = layers[0][first]
    rows, columns = (call.store.new_of(n, cells.ravel()) for n in (len(first), shape[1]))
    wide = left_open == last[1] if left_open in last else shape[1] >= len(first)
    call.grid(cells.ravel(), rows.repeat(shape[1]), np.tile(columns, len(first)), wide=wide)
    result: list[Dim] = [None] * atoms.ndim
    result[last[0]] = Axis(rows[which.reshape(-1)], np.asarray(zeros.all((0, 2))), fading)
    result[last[1]] = Axis(columns, np.asarray(zeros.all((0, 1))), fading)
    return result


RULES: dict[str, Rule] = dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "view_copy"), reshape)
