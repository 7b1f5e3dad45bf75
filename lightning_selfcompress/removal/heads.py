"""Heads of attention, which go as a whole, and positions within heads, which go in every head."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_selfcompress.channels.channels import Channels

Flags = NDArray[np.bool_]

PART_OF_A_HEAD = "channels of heads go with their whole head, or at one position of all heads"


def keep_whole(channels: Channels, going: Flags, reasons: dict[int, str]) -> bool:
    """Takes the channels of heads out of ``going``, except those of whole heads and of whole positions.

    A head that returns nothing but zeros goes with all its channels, dead or not: no other part of the network sees its
    queries and keys.

    Args:
        channels: The channels of a module.
        going: Whether each channel is to be removed, ``(channels.count,)``; changed in place.
        reasons: Why channels are kept, which gets an entry for every channel that is taken out.

    Returns:
        Whether anything was changed.
    """
    cells = channels.cells
    if not len(cells):
        return False
    cell, row, column, returned = cells[:, 0], cells[:, 1], cells[:, 2], cells[:, 3] == 1
    before = going.copy()
    stays = channels.not_run()
    stays[[n for n in (*channels.kept(), *reasons) if n < channels.count and reasons.get(n) != PART_OF_A_HEAD]] = True
    whole = _all_of(row, going[cell]) | (_all_of(row, going[cell] | ~returned) & _any_of(row, returned))
    whole &= ~_any_of(row, stays[cell]) & ~_may_not(channels, row)
    positions = _all_of(column, going[cell] | whole) & ~_all_of(column, whole) & ~_may_not(channels, column)
    goes = whole | positions
    going[np.unique(cell)] = True
    going[cell[~goes]] = False  # a channel may be in several heads
    for kind, flags in ((row, whole), (column, positions)):
        numbers = kind[kind < channels.count]
        going[numbers] = False
        going[kind[flags & (kind < channels.count)]] = True
    for number in np.flatnonzero(before & ~going).tolist():
        reasons[number] = PART_OF_A_HEAD
    return bool((before != going).any())


def parts_of_heads(channels: Channels, removed: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Returns the channels of a removal that are in heads, each with what goes and with its number.

    What goes is 1 for the whole head, 2 for the position in all heads.
    """
    cells, going = channels.cells, np.isin(channels.cells[:, 0], list(removed))
    whole = _all_of(cells[:, 1], going) if len(cells) else going
    found: dict[int, tuple[int, int]] = {}
    for kind, flags in ((1, whole), (2, going & ~whole)):
        for row in cells[flags].tolist():
            found.setdefault(row[0], (kind, row[kind]))
            found.setdefault(row[kind], (kind, row[kind]))
    return found


def _may_not(channels: Channels, numbers: NDArray[np.int64]) -> Flags:
    """Returns for each cell whether its head, or its position, is pinned."""
    return np.isin(numbers, list(channels.pinned))


def _any_of(line: NDArray[np.int64], flags: Flags) -> Flags:
    """Returns for each cell whether the flag of any cell in its row or column ``line`` is set."""
    return np.isin(line, line[flags])


def _all_of(line: NDArray[np.int64], flags: Flags) -> Flags:
    return ~_any_of(line, ~flags)
