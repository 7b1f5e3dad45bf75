"""Channels: the entries of a network's tensors that live and die together."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.tensors import stored_tensors


@dataclass(frozen=True)
class Slot:
    """One dimension of one stored tensor.

    Args:
        name: Path of the parameter or buffer, ``"features.0.weight"``.
        dim: The dimension.
        size: Positions along it.
        start: Where they begin in the array of all atoms.
        produces: Whether the tensor holds the depths of a quantized weight, which make a channel live or die.
        fades: Whether this is a vector in float (a bias, a scale, a shift) that goes to zero before a channel goes.
        attribute: Whether ``name`` is no tensor but a number: the size of a normalization layer without tensors.
    """

    name: str
    dim: int
    size: int
    start: int
    produces: bool = False
    fades: bool = False
    attribute: bool = False

    @property
    def atoms(self) -> slice:
        """The slice of an array over all atoms that holds these positions."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a network, as read off a training step. A channel is a group of atoms, numbered from 1.

    Args:
        slots: Every dimension of every stored tensor.
        group: The channel of each atom, ``(atoms,)``; 0 for none.
        pinned: Channels that have to stay, each with the reason.
        unseen: Trainable parameters that took no part in the steps watched. While there are any, nothing is removed.
        untouched: Frozen parameters that took no part in the steps watched. What they belong to stays.
    """

    slots: tuple[Slot, ...]
    group: NDArray[np.int64]
    pinned: Mapping[int, str]
    unseen: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of channels, numbered 0 (none) to ``count - 1``."""
        return int(self.group.max(initial=0)) + 1

    def produced(self) -> NDArray[np.bool_]:
        """Whether each channel has producers, ``(count,)``."""
        flags = np.zeros(self.count, bool)
        for slot in self.slots:
            if slot.produces:
                flags[self.group[slot.atoms]] = True
        flags[0] = False
        return flags

    def removable(self) -> NDArray[np.bool_]:
        """Whether each channel may ever be removed, ``(count,)``: it has producers and is not pinned."""
        flags = self.produced()
        pinned = np.fromiter(self.pinned, np.int64, len(self.pinned))
        flags[pinned[pinned < len(flags)]] = False
        flags[self.of_untouched()] = False
        return flags if not self.unseen else np.zeros_like(flags)

    def of_untouched(self) -> NDArray[np.bool_]:
        """Whether a frozen parameter that took no part in the steps watched has each channel, ``(count,)``."""
        flags = np.zeros(self.count, bool)
        names = set(self.untouched)
        for slot in self.slots if names else ():
            if slot.name in names:
                flags[self.group[slot.atoms]] = True
        return flags

    def of(self, name: str, dim: int) -> NDArray[np.int64]:
        """The channel of each position along a dimension of a tensor.

        Raises:
            KeyError: If no such dimension is known.
        """
        for slot in self.slots:
            if (slot.name, slot.dim) == (name, dim):
                return self.group[slot.atoms]
        raise KeyError(f"Expected a dimension of a stored tensor, got {name!r}, {dim}.")

    def pin(self, channels: Sequence[int], reason: str) -> "Channels":
        """The same channels, some more of them pinned."""
        return replace(self, pinned={**dict.fromkeys(channels, reason), **self.pinned})

    def without(self, removed: NDArray[np.bool_]) -> "Channels":
        """The channels that are left when the flagged ones ``(count,)`` are gone; their numbers stay."""
        kept = ~removed[self.group]
        slots, start = [], 1
        for slot in self.slots:
            size = int(kept[slot.atoms].sum())
            slots.append(replace(slot, size=size, start=start))
            start += size
        return replace(self, slots=tuple(slots), group=self.group[kept])

    def without_numbers(self, numbers: Sequence[int]) -> "Channels":
        """The channels that are left when the channels with these numbers are gone."""
        gone = np.zeros(self.count, bool)
        gone[list(numbers)] = True
        return self.without(gone)

    def state_dict(self) -> dict[str, Any]:
        """The channels as lists and tensors, for a checkpoint that opens with ``weights_only=True``."""
        return {
            "slots": [list(astuple(slot)) for slot in self.slots],
            "group": torch.from_numpy(self.group.astype(np.int32)),
            "pinned": dict(self.pinned),
            "unseen": list(self.unseen),
            "untouched": list(self.untouched),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Channels":
        """Inverse of :meth:`state_dict`."""
        slots = tuple(Slot(*values) for values in state["slots"])
        group = state["group"].cpu().numpy().astype(np.int64)
        return cls(slots, group, dict(state["pinned"]), tuple(state["unseen"]), tuple(state["untouched"]))

    def describes(self, model: nn.Module) -> bool:
        """Whether a module has the tensors, and the sizes, that these channels were read from."""
        tensors = stored_tensors(model)
        sizes = {(s.name, s.dim): s.size for s in self.slots if not s.attribute}
        return sizes == {(name, d): n for name, tensor in tensors.items() for d, n in enumerate(tensor.shape)}
