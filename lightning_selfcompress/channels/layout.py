"""Layouts: the known channels of one tensor, and what the views of one piece of memory share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_selfcompress.channels.atoms import Atoms, AtomStore, Axis, Dim, Dims, Uniform


class Storage:
    """The state that all views of one piece of memory share.

    Args:
        whole: The storage of which this one is a part that no other part overlaps, as ``unsafe_split`` makes them.

    Attributes:
        views: Number of known tensors that view the memory.
        written: Whether an operation wrote through one of several views, so that no dimension is uniform any more.
        zero_lost: Whether a write may have left a value other than zero where dead channels were known to be zero.
        lost: Whether a write put other channels into the memory, so that its channels are unknown.
    """

    def __init__(self, whole: "Storage | None" = None) -> None:
        self.views, self.written, self.zero_lost, self.lost = 0, False, False, False
        self.whole = whole
        self._parts: list[Storage] = []
        if whole is not None:
            whole._parts.append(self)

    def lose(self) -> None:
        """Notes that the channels in this memory are unknown."""
        self.written = self.lost = True

    def lose_around(self) -> None:
        """Notes a write to this memory in what it is a part of, and in its own parts; other parts keep theirs."""
        above = self.whole
        while above is not None:
            above.lose()
            above = above.whole
        below = self._parts.copy()
        while below:
            part = below.pop()
            part.lose()
            below += part._parts


@dataclass(frozen=True, eq=False)
class Constant:
    """The origin of a tensor that was computed from parameters alone.

    A penalty on parameters pins no channels. Once such a tensor is combined with data, its parameters have taken part
    in the step, and the atoms that it owes are pinned.

    Args:
        parameters: Ids of the parameters.
        owed: Arrays of atoms that were reduced over, each with the reason for which the atoms have to be kept.
        reduced: Whether a reduction took part in the computation.
    """

    parameters: frozenset[int] = frozenset()
    owed: tuple[tuple[Atoms, str], ...] = ()
    reduced: bool = False


class Layout:
    """The known channels of one tensor, and its origin.

    Args:
        dims: The dimensions of the tensor.
        storage: The state that the tensor shares with all views of its memory.
        constant: The origin of the tensor, if it was computed from parameters alone.
        produced: The axis of the bit depths, for a quantized weight whose output channels lie along two dimensions.
        is_nought: Whether the tensor is the number zero, as the program has it.
        stored: Whether the tensor is a parameter or a buffer, or was computed from these alone.
    """

    def __init__(
        self,
        dims: Dims,
        storage: Storage,
        *,
        constant: Constant | None = None,
        produced: Axis | None = None,
        is_nought: bool = False,
        stored: bool = False,
    ) -> None:
        self._dims = tuple(None if isinstance(d, Axis) and len(d) == 1 else d for d in dims)
        self.storage, self.constant, self.produced, self.stored = storage, constant, produced, stored
        self._is_nought = is_nought
        storage.views += 1

    @property
    def is_nought(self) -> bool:
        """Whether the tensor is the number zero, as the program has it, and nothing was written to it."""
        return self._is_nought and not self.storage.written

    @property
    def dims(self) -> Dims:
        """The dimensions of the tensor, without the facts that writes through other views of its memory have undone."""
        if self.storage.lost:
            return (None,) * len(self._dims)
        dims = never_zero(self._dims) if self.storage.zero_lost else self._dims
        return tuple(None if isinstance(d, Uniform) else d for d in dims) if self.storage.written else dims


def never_zero(dims: Dims) -> Dims:
    """Returns dimensions with the same channels, none of which is known to be zero when it is dead."""
    return tuple(d.with_zero(False) if isinstance(d, Axis) else d for d in dims)


_WRITTEN = "it is written through a view"


def overwritten(
    before: Layout, dims: Dims, constant: Constant | None, store: AtomStore, *, stored: bool = False
) -> Layout:
    """Returns the layout of a tensor that was written to in place.

    Other views of the memory keep their layouts. So what was known of the tensor and what is known of it now live and
    die together, and other views lose what the write may have undone.

    Args:
        before: The layout of the tensor before it was written to.
        dims: Its dimensions afterwards.
        constant: Its origin afterwards.
        store: The store that receives the ties and pins.
        stored: Whether what was written was computed from parameters and buffers alone. A view of a buffer remains
            one, so that whatever else is written to it is noted, too.
    """
    before.storage.lose_around()
    if before.storage.views == 1:
        return Layout(dims, Storage(before.storage.whole), constant=constant, stored=stored)
    after = Layout(dims, before.storage, constant=constant, stored=stored or before.stored)
    before.storage.written = True
    if len(dims) != len(before.dims):
        before.storage.lost = True
        for dim in (*before._dims, *dims):
            _pin(dim, store)
        return after
    for one, other in zip(before.dims, dims, strict=True):
        if isinstance(one, Axis) and isinstance(other, Axis) and len(one) == len(other):
            store.tie(one.atoms, other.atoms, _WRITTEN)
        else:
            _pin(one, store)
            _pin(other, store)
    if any(_loses_zero(one, other) for one, other in zip(before.dims, dims, strict=True)):
        before.storage.zero_lost = True
    return after


def _pin(dim: Dim, store: AtomStore) -> None:
    if isinstance(dim, Axis):
        store.pin(dim.atoms, _WRITTEN)


def _loses_zero(before: Dim, after: Dim) -> bool:
    return isinstance(before, Axis) and isinstance(after, Axis) and bool((before.zero & ~after.zero).any())


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Returns whether one of two tensors is a view of the other, or both are views of one."""
    return bool(torch._C._is_alias_of(one, other))  # type: ignore[attr-defined]
