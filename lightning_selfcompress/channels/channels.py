"""Channels: the entries of a network's tensors that live and die together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.channels.atoms import smallest_of_components
from lightning_selfcompress.tensors import stored_tensors


@dataclass(frozen=True)
class Slot:
    """One dimension of one stored tensor.

    Args:
        name: Path of the parameter or buffer, for example ``"features.0.weight"``.
        dim: The dimension.
        size: Number of positions along the dimension.
        start: Index of the first position in the array of all atoms.
        produces: Whether the tensor holds the bit depths of a quantized weight, which decide whether a channel is dead.
        fades: Whether the tensor is a float vector (a bias, a scale, a shift) that is zero before a channel is removed.
            A buffer fades only where an operation needs it.
        attribute: Whether ``name`` is an attribute instead, the size of a normalization layer without tensors.
        rewritten: Whether steps write values to this buffer that are not zero when a channel is dead, so that it cannot
            fade.
    """

    name: str
    dim: int
    size: int
    start: int
    produces: bool = False
    fades: bool = False
    attribute: bool = False
    rewritten: bool = False

    @property
    def atoms(self) -> slice:
        """The slice of these positions in an array over all atoms."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a network, read from a training step. A channel is a group of atoms, numbered from 1.

    Args:
        slots: Every dimension of every stored tensor.
        group: The channel of each atom, ``(atoms,)``; 0 for an atom without a channel.
        pinned: Channels that have to be kept, each with the reason.
        unseen: Trainable parameters that took no part in the watched steps. The channels of these parameters are kept.
        untouched: Frozen parameters that took no part in the watched steps. The channels of these parameters are kept.
        passive: Parameters that no watched step ran with gradients: frozen, a copy, or not run at all.
        cells: The channels within heads of attention, ``(cells, 4)``: the channel, its head, its position in the heads
            of its kind, and whether it is one of what the heads return. Such a channel goes with its whole head, or
            with the channels at its position in all heads. Heads and positions have the numbers of channels that go
            with them, or numbers of their own from ``count`` on; those in ``pinned`` are kept.
    """

    slots: tuple[Slot, ...]
    group: NDArray[np.int64]
    pinned: Mapping[int, str]
    unseen: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    passive: tuple[str, ...] = ()
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    @cached_property
    def count(self) -> int:
        """The length of an array over the channels: the largest channel number plus one, as 0 means no channel."""
        return int(self.group.max(initial=0)) + 1

    def produced(self) -> NDArray[np.bool_]:
        """Returns whether each channel has producers, ``(count,)``."""
        flags = np.zeros(self.count, bool)
        for slot in self.slots:
            if slot.produces:
                flags[self.group[slot.atoms]] = True
        flags[0] = False
        return flags

    def removable(self) -> NDArray[np.bool_]:
        """Returns whether each channel may ever be removed, ``(count,)``.

        Such a channel has producers, is not pinned, and belongs to no parameter that took no part in the steps.
        """
        flags = self.produced()
        flags[list(self.kept())] = False
        flags[self.not_run()] = False
        return flags

    def kept(self) -> dict[int, str]:
        """Returns the channels that have to be kept, each with the reason.

        These are the pinned channels, and those in heads of which neither the head nor the position may go.
        """
        kept = {number: why for number, why in self.pinned.items() if number < self.count}
        for cell, head, position, _ in self.cells.tolist():
            if head in self.pinned and position in self.pinned:
                kept.setdefault(cell, self.pinned[head])
        return kept

    def not_run(self) -> NDArray[np.bool_]:
        """Returns whether each channel belongs to a parameter in ``unseen`` or ``untouched``, ``(count,)``."""
        flags = np.zeros(self.count, bool)
        names = {*self.unseen, *self.untouched}
        for slot in self.slots if names else ():
            if slot.name in names:
                flags[self.group[slot.atoms]] = True
        return flags

    def waiting(self) -> dict[int, str]:
        """Returns the channels that a parameter which took no part could still read, each with the parameter's name.

        Such a parameter may be a head that takes its turn in a later epoch. All that is known of it is its shape: it
        can read channels whose number divides one of its dimensions.
        """
        widths: dict[int, str] = {}
        names = {*self.unseen, *self.untouched}
        for slot in self.slots:
            if slot.name in names and slot.size > 1:
                widths.setdefault(slot.size, slot.name)
        found: dict[int, str] = {}
        not_run = self.not_run()
        for slot in self.slots if widths else ():
            if slot.produces and slot.size > 1 and not not_run[self.group[slot.atoms]].all():
                reader = next((name for size, name in widths.items() if size % slot.size == 0), None)
                if reader is not None:
                    for number in np.unique(self.group[slot.atoms]).tolist():
                        found.setdefault(number, reader)
        return found

    def tie(self, pairs: Sequence[tuple[str, str]], reason: str) -> "Channels":
        """Returns the same channels with the entries of some tensors tied to the entries of others of the same shape.

        Args:
            pairs: The names of two tensors each, whose entries at equal positions live and die together.
            reason: Why a channel is pinned that is tied to an entry without a channel.
        """
        slots = self._slots_by_name
        tied = [
            (a.atoms, b.atoms)
            for one, other in pairs
            for a, b in zip(slots.get(one, ()), slots.get(other, ()), strict=False)
            if a.size == b.size
        ]
        if not tied:
            return self
        one = np.concatenate([self.group[a] for a, _ in tied])
        other = np.concatenate([self.group[b] for _, b in tied])
        free = (one != 0) & (other != 0)
        first = smallest_of_components(self.count, one[free], other[free])
        pinned: dict[int, str] = {}
        for number, why in self.pinned.items():
            pinned.setdefault(int(first[number]), why)
        for number in np.unique(np.maximum(one, other)[~free]).tolist():
            if number:
                pinned.setdefault(int(first[number]), reason)
        cells = self.cells.copy()
        cells[:, :3] = np.where(
            cells[:, :3] < len(first), first[np.minimum(cells[:, :3], len(first) - 1)], cells[:, :3]
        )
        return replace(self, group=first[self.group], pinned=pinned, cells=cells)

    def of_tensors(self, names: Iterable[str]) -> list[int]:
        """Returns the channels of some tensors, along all their dimensions, ascending."""
        slots = (slot for name in names for slot in self._slots_by_name.get(name, ()))
        found = {number for slot in slots for number in np.unique(self.group[slot.atoms]).tolist()}
        return sorted(found - {0})

    @cached_property
    def _slots_by_name(self) -> dict[str, list[Slot]]:
        """The slots of each tensor, one for each dimension."""
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            found.setdefault(slot.name, []).append(slot)
        return found

    def of(self, name: str, dim: int) -> NDArray[np.int64]:
        """Returns the channel of each position along a dimension of a tensor.

        Raises:
            KeyError: If there is no slot for the dimension.
        """
        for slot in self._slots_by_name.get(name, ()):
            if slot.dim == dim:
                return self.group[slot.atoms]
        raise KeyError(f"Expected a dimension of a stored tensor, got {name!r}, {dim}.")

    def pin(self, channels: Sequence[int], reason: str) -> "Channels":
        """Returns the same channels with more of them pinned; a channel that is pinned already keeps its reason."""
        return replace(self, pinned={**dict.fromkeys(channels, reason), **self.pinned})

    def differs_from(self, other: "Channels | None") -> bool:
        """Returns whether these channels say anything else than others of the same module."""
        if other is None or len(self.group) != len(other.group):
            return True
        same = (self.unseen, self.untouched, self.passive) == (other.unseen, other.untouched, other.passive)
        same &= dict(self.pinned) == dict(other.pinned) and np.array_equal(self.cells, other.cells)
        return not same or not np.array_equal(self.group, other.group)

    def without(self, removed: NDArray[np.bool_]) -> "Channels":
        """Returns the channels after the removal of the flagged channels ``(count,)``; the numbers do not change."""
        kept = ~removed[self.group]
        slots, start = [], 1
        for slot in self.slots:
            size = int(kept[slot.atoms].sum())
            slots.append(replace(slot, size=size, start=start))
            start += size
        numbers = self.cells[:, 0]
        cells = self.cells[~removed[np.minimum(numbers, len(removed) - 1)]]
        return replace(self, slots=tuple(slots), group=self.group[kept], cells=cells)

    def without_numbers(self, numbers: Sequence[int]) -> "Channels":
        """Returns the channels after the removal of the channels with these numbers."""
        gone = np.zeros(self.count, bool)
        gone[list(numbers)] = True
        return self.without(gone)

    def state_dict(self) -> dict[str, Any]:
        """Returns the channels as lists and tensors, for a checkpoint that opens with ``weights_only=True``."""
        return {
            "slots": [list(astuple(slot)) for slot in self.slots],
            "group": torch.from_numpy(self.group.astype(np.int32)),
            "pinned": dict(self.pinned),
            "unseen": list(self.unseen),
            "untouched": list(self.untouched),
            "passive": list(self.passive),
            "cells": torch.from_numpy(self.cells.astype(np.int64)),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Channels":
        """Makes the channels from the result of :meth:`state_dict`."""
        slots = tuple(Slot(*values) for values in state["slots"])
        group = state["group"].cpu().numpy().astype(np.int64)
        unseen, untouched, passive = (tuple(state[n]) for n in ("unseen", "untouched", "passive"))
        cells = state["cells"].cpu().numpy().astype(np.int64)
        return cls(slots, group, dict(state["pinned"]), unseen, untouched, passive, cells)

    def describes(self, model: nn.Module) -> bool:
        """Returns whether the tensors of a module have the names and sizes in these slots."""
        tensors = stored_tensors(model)
        sizes = {(s.name, s.dim): s.size for s in self.slots if not s.attribute}
        return sizes == {(name, d): n for name, tensor in tensors.items() for d, n in enumerate(tensor.shape)}
