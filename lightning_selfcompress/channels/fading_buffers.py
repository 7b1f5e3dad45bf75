"""Buffers that hold constants of channels, as frozen normalization does, and fade with dead channels."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lightning_selfcompress.channels.atoms import AtomStore, Axis, Dims
from lightning_selfcompress.channels.channels import Slot


class FadingBuffers:
    """The buffers of a model that may fade, and what the watched steps have shown of them.

    A buffer of one value per channel fades where an operation with data would else not be zero for a dead channel, and
    only if no step writes other values than zero to it.

    Args:
        store: The store in which the rules note the buffers that they take to be zero.
    """

    def __init__(self, store: AtomStore) -> None:
        self._store = store
        self._names: dict[int, str] = {}  # by the ids of the buffers
        self._rewritten: set[str] = set()

    def add(self, name: str, buffer: Tensor) -> frozenset[int]:
        """Returns the ids for :attr:`Axis.fading` of a buffer, which are none if it cannot fade."""
        expanded = any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))
        if expanded or not buffer.is_floating_point() or sum(n > 1 for n in buffer.shape) != 1:
            return frozenset()
        self._names[id(buffer)] = name
        self._store.entries[id(buffer)] = int(buffer.count_nonzero())
        return frozenset({id(buffer)})

    def note_written(self, before: Dims, after: Dims | None) -> None:
        """Notes the buffers to which an operation writes values that are not zero when a channel is dead.

        Args:
            before: The dimensions of a buffer, or of a view of it.
            after: The dimensions of what is written to it; None if nothing is known of it.
        """
        for i, old in enumerate(before):
            new = after[i] if after is not None else None
            if isinstance(old, Axis) and old.fading:
                stays = isinstance(new, Axis) and (new.zero.all() or new.fading == old.fading)
                self._rewritten |= set() if stays else {self._names[key] for key in old.fading}

    def note_replaced(self, tensors: Mapping[str, Tensor]) -> None:
        """Notes the buffers in whose places a step put other tensors; ``tensors`` are those of the model by name."""
        self._rewritten |= {name for key, name in self._names.items() if id(tensors.get(name)) != key}

    def recall(self, slots: Iterable[Slot]) -> None:
        """Takes up what earlier steps have shown."""
        for slot in slots:
            self._rewritten |= {slot.name} if slot.rewritten else set()
            self._store.fading |= {key for key, name in self._names.items() if name == slot.name and slot.fades}

    def noted(self, slots: Iterable[Slot]) -> tuple[Slot, ...]:
        """Returns slots in which the buffers that fade, and those that steps rewrite, are marked."""
        faded = {self._names[key] for key in self._store.fading} - self._rewritten
        marked = (replace(s, rewritten=True) if s.name in self._rewritten else s for s in slots)
        return tuple(replace(s, fades=True) if s.name in faded and s.size > 1 else s for s in marked)
