"""Grids: channels that a reshape lays out in rows and columns, as attention lays out its heads.

A view of ``(..., channels)`` as ``(..., heads, positions)`` makes every channel a cell of a grid. A network of the
smaller shape computes the same only if the cells that go are whole rows or whole columns. Every row and every column
has an atom of its own, which is tied and pinned as any other atom; :func:`grouped` concludes what that says about the
cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_selfcompress.channels.atoms import FIXED, AtomStore, Grid
from lightning_selfcompress.channels.channels import Channels


@dataclass(frozen=True)
class Groups:
    """The groups of all atoms, see :meth:`AtomStore.groups`, and the cells of attention.

    Args:
        group: The group of each atom, ``(count,)``.
        pinned: The first reason that was given for each pinned group.
        cells: One row for each cell of a grid whose rows are heads of attention, ``(cells, 4)``: the group of the cell,
            of its row and of its column, and whether the column is one of what the heads return (1 or 0).
    """

    group: NDArray[np.int64]
    pinned: dict[int, str]
    cells: NDArray[np.int64]


def grouped(store: AtomStore) -> Groups:
    """Merges the ties, pins and grids of a store into groups of atoms.

    Where rows are multiplied one by one, as heads of attention are, cells in tied rows and tied columns are tied, and
    rows and columns may go. Anywhere else, either rows or columns go: the columns, if there are as many, or more, of
    them, otherwise the rows.
    """
    if not store.grids:
        return Groups(*store.groups(), np.zeros((0, 4), np.int64))
    store = store.copy()
    classes = _classes(store)
    heads = np.unique(classes[np.concatenate(store.batches)]) if store.batches else np.zeros(0, np.int64)
    plain = [grid for grid in store.grids if not np.isin(classes[grid.rows], heads).any()]
    for grid in plain:
        if not grid.merges:
            _keep_one(store, grid, rows_go=not grid.wide)
    _settle_merges(store, [grid for grid in plain if grid.merges])
    left = _with_free_rows(store, [grid for grid in store.grids if grid not in plain])
    return _keyed(store, left)


def numbered(groups: Groups, count: int) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Returns the table of cells, and the pinned groups, by numbers that depend on the groups of tensors alone.

    Args:
        groups: The groups of all atoms, those of tensors first.
        count: Number of the groups that have atoms of tensors. A row or column without such an atom gets a number from
            here on, by its first cell.
    """
    cells = groups.cells[groups.cells[:, 0] < count].copy()
    if not len(groups.cells):
        return groups.cells, {number: why for number, why in groups.pinned.items() if number < count}
    names = {number: number for number in range(count)}
    for i in (1, 2):
        for cell, number in zip(cells[:, 0].tolist(), cells[:, i].tolist(), strict=True):  # cells are ascending
            names.setdefault(number, i * count + cell)
        cells[:, i] = [names[number] for number in cells[:, i].tolist()]
    pinned = {names[number]: why for number, why in groups.pinned.items() if number in names}
    return np.unique(cells, axis=0), pinned


def recall_cells(store: AtomStore, earlier: Channels) -> None:
    """Takes up the heads that earlier steps have shown; the store has the atoms of tensors alone so far.

    Args:
        store: The store.
        earlier: The channels that the earlier steps have shown, of the same atoms.
    """
    cells = earlier.cells
    if not len(cells):
        return
    numbers, which = np.unique(cells[:, :3], return_inverse=True)
    there, first = np.unique(earlier.group, return_index=True)
    known = np.isin(numbers, there)
    atoms = np.where(known, first[np.searchsorted(there, numbers).clip(max=len(there) - 1)], FIXED)
    atoms[~known] = store.new(int((~known).sum()))  # heads and positions that no tensor has
    of = atoms[which.reshape(-1, 3)]
    for merges in (False, True):
        some = of[(cells[:, 3] == 1) == merges]
        store.grids.append(Grid(some[:, 0], some[:, 1], some[:, 2], merges, True, "it is part of a head"))
    for number, atom in zip(numbers.tolist(), atoms.tolist(), strict=True):
        if number in earlier.pinned:
            store.pin(np.array([atom]), earlier.pinned[number])
    store.batches.append(of[:, 1])


def _keep_one(store: AtomStore, grid: Grid, *, rows_go: bool) -> None:
    """Ties cells to their rows or to their columns, whichever may go, and pins the others."""
    store.tie(grid.cells, grid.rows if rows_go else grid.columns, grid.reason)
    store.pin(grid.columns if rows_go else grid.rows, grid.reason)


def _settle_merges(store: AtomStore, grids: Sequence[Grid]) -> None:
    """Ties the cells of dimensions that are merged to the one that is not pinned; both are pinned if neither is."""
    pinned = _pinned(store) if grids else np.zeros(0, bool)
    for grid in grids:
        rows, columns = (bool(pinned[atoms].any()) for atoms in (grid.rows, grid.columns))
        if not rows and not columns:
            store.pin(grid.columns, grid.reason)
        _keep_one(store, grid, rows_go=columns and not rows)


def _with_free_rows(store: AtomStore, grids: list[Grid]) -> list[Grid]:
    """Returns the grids of attention whose heads may go; the cells of all others are tied to their columns.

    Heads stay if they are pinned themselves, and if what they are merged into is: a pinned cell keeps its head.
    """
    while grids:
        pinned = _pinned(store)
        stay = [g for g in grids if pinned[g.rows].any() or (g.merges and pinned[g.cells].any())]
        if not stay:
            return grids
        for grid in stay:
            _keep_one(store, grid, rows_go=False)
        grids = [grid for grid in grids if grid not in stay]
    return []


def _keyed(store: AtomStore, grids: Sequence[Grid]) -> Groups:
    """Ties the cells that are in tied rows and in tied columns, and returns the groups and the table of cells."""
    table: list[NDArray[np.int64]] = []
    if grids:
        classes = _classes(store)
        keys = np.concatenate([np.stack([classes[g.rows], classes[g.columns]], 1) for g in grids])
        cells = np.concatenate([g.cells for g in grids])
        _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        store.tie(cells, cells[first][which.reshape(-1)], "a reshape combines it with values of a fixed number")
        returned = np.concatenate([classes[g.columns] for g in grids if g.merges] or [np.zeros(0, np.int64)])
        lines = (np.concatenate([getattr(g, name) for g in grids]) for name in ("rows", "columns"))
        table = [cells, *lines, np.isin(keys[:, 1], returned).astype(np.int64)]
    group, reasons = store.groups()
    if not table:
        return Groups(group, reasons, np.zeros((0, 4), np.int64))
    found = np.stack([*(group[atoms] for atoms in table[:3]), table[3]], 1)
    return Groups(group, reasons, np.unique(found[table[0] != FIXED], axis=0))


def _classes(store: AtomStore) -> NDArray[np.int64]:
    return store.groups()[0]


def _pinned(store: AtomStore) -> NDArray[np.bool_]:
    """Returns whether each atom is pinned."""
    group, reasons = store.groups()
    flags = np.isin(group, list(reasons))
    flags[FIXED] = True
    return flags
