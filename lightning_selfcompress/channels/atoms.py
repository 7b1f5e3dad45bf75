"""Atoms, the ties between atoms that live and die together, and the pins on atoms that are always kept.

An atom is one index along one dimension of one stored tensor. A watched step yields pairs of atoms that must be kept or
removed together, and atoms that must be kept in any case. The store holds both as arrays and merges them into groups
once, at the end.

A tensor that a step makes and fills with one number (``torch.zeros(n, width)``) fits any channels, as long as the
program reads its size from them. Its dimensions are blank: they have atoms of their own, which belong to no stored
tensor and are tied to those that the blank dimension meets. A blank dimension that meets fixed positions is fixed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Atoms = NDArray[np.int64]


Flags = NDArray[np.bool_]


FIXED = 0  # the atom at every position that belongs to no channel


@dataclass(frozen=True, eq=False)
class Axis:
    """The channels along one dimension of a tensor.

    Args:
        atoms: The atom at each position, ``(size,)``.
        zero: Whether the tensor is exactly zero at a position once the producers of that atom are dead, ``(size,)``.
        fading: Ids of the buffers that would have to fade for the tensor to be zero at all positions; empty if that
            would not be enough. Only tensors computed from parameters and buffers alone have such ids.
    """

    atoms: Atoms
    zero: Flags
    fading: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.atoms)

    def __getitem__(self, positions: slice | NDArray[np.int64]) -> "Axis":
        return Axis(self.atoms[positions], self.zero[positions], self.fading)

    def with_zero(self, zero: Flags | bool) -> "Axis":
        """Returns an axis with the same atoms and other zero flags."""
        return Axis(self.atoms, everywhere(zero, len(self.atoms)) if isinstance(zero, bool) else zero)

    def repeat(self, times: int) -> "Axis":
        """Returns an axis that has every position ``times`` times in a row."""
        return Axis(np.repeat(self.atoms, times), np.repeat(self.zero, times), self.fading)

    def tile(self, times: int) -> "Axis":
        """Returns an axis that has this whole axis ``times`` times in a row."""
        return Axis(np.tile(self.atoms, times), np.tile(self.zero, times), self.fading)


def everywhere(flag: bool, size: int) -> Flags:
    """Returns an array with the same flag at every position."""
    return np.ones(size, bool) if flag else np.zeros(size, bool)  # np.full takes six times as long for False


class Uniform:
    """The class of :data:`UNIFORM`, which marks a dimension along which nothing varies, such as ``expand`` makes."""

    def __repr__(self) -> str:
        return "UNIFORM"


UNIFORM = Uniform()


Dim = Axis | Uniform | None  # None marks a dimension whose positions belong to no channel


Dims = tuple[Dim, ...]


def join(axes: Sequence[Axis]) -> Axis:
    """Returns the concatenation of several axes."""
    return Axis(np.concatenate([a.atoms for a in axes]), np.concatenate([a.zero for a in axes]))


def fixed(size: int) -> Axis:
    """Returns an axis whose positions belong to no channel, to be joined to axes whose positions do."""
    return Axis(np.full(size, FIXED), np.zeros(size, bool))


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a dimension that is split into rows and columns, or into which these are merged.

    Args:
        cells: The atom of each cell, ``(cells,)``.
        rows: The atom of the row of each cell.
        columns: The atom of the column of each cell.
        merges: Whether rows and columns are merged.
        wide: Whether there are at least as many columns as rows.
        reason: The reason for which rows or columns are kept.
    """

    cells: Atoms
    rows: Atoms
    columns: Atoms
    merges: bool
    wide: bool
    reason: str


class AtomStore:
    """Collects the ties, the pins and the grids that a watched step yields."""

    def __init__(self) -> None:
        self.count = 1  # atom 0 is FIXED
        self.entries: dict[int, int] = {}  # ids of the buffers that may fade, with the number of entries not zero yet
        self.fading: set[int] = set()  # ids of the buffers that a rule has taken to be zero where a channel is dead
        self.lost: dict[int, str] = {}  # by atom, where a tensor was first not zero any more when the channel is dead
        self.grids: list[Grid] = []
        self.batches: list[Atoms] = []  # along which products of matrices are taken one by one, as for heads
        # keyed by the ids of both arrays, which the value keeps alive; a tie that a loop repeats is stored once
        self._ties: dict[tuple[int, int], tuple[Atoms, Atoms, str]] = {}
        self._blanks: list[int] = []  # the first atom of each blank dimension, ascending
        self._ends: list[int] = []  # the atom after the last one of each blank dimension
        self._fixed: list[bool] = []  # whether each blank dimension is fixed

    def new(self, size: int) -> Atoms:
        """Makes ``size`` new atoms and returns their numbers."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def copy(self) -> "AtomStore":
        """Returns a store with the same atoms, ties, pins, blank dimensions and grids."""
        copied = AtomStore()
        copied.count, copied.grids, copied.batches = self.count, self.grids, self.batches
        copied._ties = dict(self._ties)
        copied._blanks, copied._ends, copied._fixed = self._blanks.copy(), self._ends.copy(), self._fixed.copy()
        return copied

    def blank(self, size: int) -> Atoms:
        """Makes ``size`` atoms of a blank dimension and returns their numbers."""
        atoms = self.new(size)
        self._blanks.append(self.count - size)
        self._ends.append(self.count)
        self._fixed.append(False)
        return atoms

    def new_of(self, size: int, *sources: Atoms) -> Atoms:
        """Makes atoms for a dimension that a reshape makes of others: a blank one, if all others are blank."""
        return self.blank(size) if all(map(self.is_blank, sources)) else self.new(size)

    def is_blank(self, atoms: Atoms) -> bool:
        """Returns whether all of some atoms belong to blank dimensions."""
        return bool(self._blanks) and bool((self._blank_of(atoms) >= 0).all())

    def is_fixed(self, atoms: Atoms) -> bool:
        """Returns whether all of some atoms belong to blank dimensions that are fixed."""
        if not self._blanks or not len(atoms) or atoms[0] < self._blanks[0]:
            return False
        return all(i >= 0 and self._fixed[i] for i in np.unique(self._blank_of(atoms)).tolist())

    def _blank_of(self, atoms: Atoms) -> NDArray[np.int64]:
        """Returns which blank dimension each atom belongs to, -1 for the atoms of tensors, and of rows and columns."""
        last = np.searchsorted(self._blanks, atoms, side="right") - 1
        return np.where((last >= 0) & (atoms < np.array(self._ends)[last]), last, -1)

    def _fix(self, atoms: Atoms, reason: str) -> None:
        """Fixes the whole of each blank dimension of which an atom is pinned: it holds positions, not channels."""
        if not self._blanks or not len(atoms) or atoms.max() < self._blanks[0]:
            return
        for i in np.unique(self._blank_of(atoms)).tolist():
            if i >= 0 and not self._fixed[i]:
                self._fixed[i] = True
                self.pin(np.arange(self._blanks[i], self._ends[i]), reason)

    def tie(self, one: Atoms, other: Atoms, reason: str) -> None:
        """Ties the atoms at equal positions of two arrays; an atom that is tied to FIXED is pinned."""
        if one.shape != other.shape:  # raised here, where the operation is still known
            raise ValueError(f"Expected as many atoms on both sides of a tie, got {len(one)} and {len(other)}.")
        if one is not other:
            self._ties.setdefault((id(one), id(other)), (one, other, reason))

    def pin(self, atoms: Atoms, reason: str) -> None:
        """Pins atoms for a reason, so that their channels are kept."""
        self._ties.setdefault((id(atoms), FIXED), (atoms, np.zeros(len(atoms), np.int64), reason))
        self._fix(atoms, reason)

    def left_to_fade(self, buffers: Iterable[int]) -> int:
        """Returns how many entries of the buffers with these ids are not zero, besides those that fade in any case."""
        return sum(self.entries[key] for key in buffers if key not in self.fading)

    def groups(self) -> tuple[NDArray[np.int64], dict[int, str]]:
        """Merges all ties and pins into groups of atoms, regardless of grids.

        Returns:
            The group of each atom ``(count,)``, numbered from 0 (group 0 contains FIXED alone), and the first reason
            that was given for each pinned group. A group has the smaller number the smaller its first atom is, so that
            the groups of stored tensors, whose atoms are made first, come before all others.
        """
        if not self._ties:
            return np.arange(self.count), {}
        ones, others, reasons = zip(*self._ties.values(), strict=True)
        one, other = np.concatenate(ones), np.concatenate(others)
        came = np.repeat(np.arange(len(ones)), [len(atoms) for atoms in ones])
        free = (one != FIXED) & (other != FIXED)
        group = _components(self.count, one[free], other[free])
        pinned = np.flatnonzero(~free & (one != other))
        groups, first = np.unique(group[np.maximum(one, other)[pinned]], return_index=True)
        first = came[pinned[first]]
        order = np.argsort(first, kind="stable")
        return group, {int(groups[i]): reasons[first[i]] for i in order}  # in the order of the reasons


def smallest_of_components(count: int, one: Atoms, other: Atoms) -> Atoms:
    """Returns the smallest member of the connected component of each of ``count`` nodes, by pointer jumping.

    Args:
        count: Number of nodes.
        one: One end of each edge.
        other: The other end of each edge.
    """
    root = np.arange(count)
    while True:
        a, b = root[one], root[other]
        differ = a != b
        if not differ.any():
            return root
        one, other, a, b = one[differ], other[differ], a[differ], b[differ]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while ((jumped := root[root]) != root).any():
            root = jumped


def _components(count: int, one: Atoms, other: Atoms) -> NDArray[np.int64]:
    """Numbers the connected components."""
    root = smallest_of_components(count, one, other)
    number: NDArray[np.int64] = np.cumsum(root == np.arange(count)) - 1
    return number[root]
