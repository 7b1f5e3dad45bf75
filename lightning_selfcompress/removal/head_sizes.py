"""The sizes that modules of attention keep as attributes, and the values that follow from a removal of heads.

Attention computes shapes from attributes such as ``num_heads``, ``head_dim`` and ``embed_dim``. Which of them a module
reads is not known, so several choices are tried, each by a dry run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.parameters import attributes_of
from lightning_selfcompress.removal.surgery import Edit, size_names
from lightning_selfcompress.tensors import name_of

_OF_ONE_HEAD = ("dim", "size", "width", "feature", "channel", "d_k", "d_v", "proj")  # in names such as head_dim


@dataclass(frozen=True)
class _Size:
    """One attribute and the value it would have after a removal; ``counts`` tells heads from widths."""

    edit: Edit
    counts: bool


def choices(model: nn.Module, channels: Channels, edits: Sequence[Edit]) -> Iterator[tuple[Edit, ...]]:
    """Yields the changes of attributes that may belong to a removal: none, numbers of heads, widths, both, one less.

    Args:
        model: The module.
        channels: Its channels.
        edits: The edits of a removal of heads, or of positions within heads.
    """
    sizes = list(_sizes(model, channels, edits))
    found: list[tuple[Edit, ...]] = [()]
    found += [tuple(s.edit for s in sizes if s.counts is counts) for counts in (True, False)]
    found.append(tuple(s.edit for s in sizes))
    if len(sizes) <= _MOST:
        found += [tuple(s.edit for s in sizes if s is not left) for left in sizes]
    yield from dict.fromkeys(found)


_MOST = 8  # attributes, above which no attribute is left out alone


def _sizes(model: nn.Module, channels: Channels, edits: Sequence[Edit]) -> Iterator[_Size]:
    """Yields the attributes of the modules around the edited tensors whose values are sizes that change."""
    by_owner: dict[str, list[Edit]] = {}
    for edit in edits:
        if np.isin(channels.of(edit.name, edit.dim), channels.cells[:, 0]).any():
            layer = edit.name.rpartition(".")[0]
            for owner in dict.fromkeys((layer, layer.rpartition(".")[0])):
                by_owner.setdefault(owner, []).append(edit)
    known: set[tuple[int, str]] = set()
    for owner, own in by_owner.items():
        module = model.get_submodule(owner)
        heads, ones, widths = _changes(channels, own)
        for name, value in attributes_of(module):
            if type(value) is not int or (id(module), name) in known or name in size_names(module):
                continue
            of_one = any(word in name.lower() for word in _OF_ONE_HEAD)
            order = (ones, widths, heads) if of_one else (heads, widths, ones)
            changes = next((c for c in order if value in c), None)
            if changes is not None and changes[value] != value:
                known.add((id(module), name))
                removed = tuple(range(changes[value], value))
                yield _Size(Edit(name_of(owner, name), 0, value, removed, attribute=True), changes is heads)


def _changes(channels: Channels, edits: Sequence[Edit]) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Returns how the numbers of heads, the sizes of one head, and the widths change, before -> after."""
    heads: dict[int, int] = {}
    ones: dict[int, int] = {}
    widths: dict[int, int] = {}
    for edit in edits:
        numbers = channels.of(edit.name, edit.dim)
        cells = channels.cells[np.isin(channels.cells[:, 0], numbers)]
        left = cells[np.isin(cells[:, 0], np.delete(numbers, list(edit.removed)))]
        now = edit.size - len(edit.removed)
        widths[edit.size] = now
        before, after = (_rows_and_columns(table) for table in (cells, left))
        heads[before[0]] = after[0]
        ones[before[1]] = after[1]
        heads.setdefault(edit.size // before[1], now // max(after[1], 1))  # several heads may share keys
    return heads, ones, widths


def _rows_and_columns(cells: NDArray[np.int64]) -> tuple[int, int]:
    """Returns the number of heads and the number of channels of each."""
    heads = len(np.unique(cells[:, 1]))
    return heads, len(np.unique(cells[:, 0])) // max(heads, 1)
