"""Entropy coding by asymmetric numeral systems over many lanes, with adaptive frequency tables.

Symbols are dealt out to lanes in turn, and all lanes take one step together, so that numpy can process them as arrays.
At fixed steps, the encoder and the decoder make the tables again from all symbols so far, so no table is stored. All
arithmetic is in integers.

Source: Duda, "Asymmetric numeral systems", 2013, arXiv 1311.2540; interleaved as in Giesen, arXiv 1402.3392.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]  # integer arrays of any width


TABLE_BITS = 14  # the frequencies of a context add up to 2^14


WORD_BITS = 16  # a lane's state lies in [2^16, 2^32) and is refilled with words of 16 bits


STEPS, MANY_STEPS = (
    2048,
    16384,
)  # symbols per lane up to FEW_LANES lanes, and per lane beyond; a lane costs a byte


FEW_LANES = 64  # the first step of all lanes has untrained tables; more lanes than this only add speed


INCREMENT = 16  # a symbol adds this to its count


EVEN = 10  # the count at which a symbol starts where nothing is known of its frequency


SINGLY = 16  # fewer lanes than this are faster with Python integers than with arrays


_LOWEST = 1 << WORD_BITS


_SLOTS, _WORD = (1 << TABLE_BITS) - 1, (1 << WORD_BITS) - 1


_FULL_BITS = 2 * WORD_BITS - TABLE_BITS  # a state at or above f * 2^18 has no room for a symbol of frequency f


class DamagedStreamError(ValueError):
    """Raised when the decoded bytes cannot come from the encoder."""


@dataclass(frozen=True, eq=False)
class Part:
    """A sequence of symbols of one kind, with tables of its own.

    Args:
        contexts: Number of the table with which each symbol is coded, ``(n,)``, from 0 to ``tables - 1``.
        tables: Number of tables.
        alphabet: Number of possible symbols, from 1 to 2^13, so that at least half of a table depends on the counts.
        symbols: The symbols, ``(n,)``, each from 0 to ``alphabet - 1``; None before they are decoded.
        start: The counts at the start, ``(tables, alphabet)``, int64, each at least 1; None if they are all the same.
    """

    contexts: Integers
    tables: int
    alphabet: int
    symbols: Integers | None = None
    start: Integers | None = None

    @property
    def counts(self) -> Integers:
        """The counts at the start, in a new array, ``(tables, alphabet)``."""
        return np.full((self.tables, self.alphabet), EVEN, np.int64) if self.start is None else self.start.copy()


def encode(groups: Sequence[Sequence[Part]], rest: bytes = b"") -> bytes:
    """Encodes the symbols of all parts, one part after another.

    The number of symbols of a group may depend on the symbols of earlier groups, and so may the number of lanes, which
    grows from group to group. The lanes end in states that hold the first bytes of ``rest``, two bytes each.

    Args:
        groups: The parts of each group, with their symbols.
        rest: The bytes that follow the parts in a file.

    Returns:
        For each group, the states of the lanes that begin with it, and the words of its symbols, little-endian; then
        the rest without the bytes that the lanes hold.
    """
    lanes = lanes_of([sum(len(part.contexts) for part in parts) for parts in groups])
    count = lanes[-1]
    state = np.frombuffer(rest[: 2 * count].ljust(2 * count, b"\0"), "<u2").astype(np.uint32) + _LOWEST
    words: list[Integers] = []  # in reverse order
    for parts, kept, used in zip(reversed(groups), reversed([0, *lanes[:-1]]), reversed(lanes), strict=True):
        put = _put_singly if used < SINGLY else _put
        words += [put(*_intervals(part, used), state) for part in reversed(parts)]
        words.append(state[kept:].astype("<u4").view("<u2"))
        state = state[:kept]
    return np.concatenate(words[::-1]).astype("<u2").tobytes() + rest[2 * count :]


class Decoder:
    """Decodes the bytes that :func:`encode` returned, group by group.

    Args:
        data: These bytes, with nothing before or after them.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._used = data, 0
        self._words: Integers = np.frombuffer(data, "<u2", len(data) // 2).astype(np.uint32)
        self._state: Integers = np.zeros(0, np.uint32)

    def begin(self, symbols: int) -> None:
        """Reads the states of the lanes that begin with a group, before memory is allocated for its symbols.

        Args:
            symbols: Number of symbols of the group.

        Raises:
            DamagedStreamError: If the data ends before these states.
        """
        more = max(lane_count(symbols) - len(self._state), 0)
        if 2 * more > len(self._words) - self._used:
            raise DamagedStreamError(f"Expected {more} more states, got {len(self._words) - self._used} words.")
        low, high = self._words[self._used : self._used + 2 * more].reshape(more, 2).T
        self._state, self._used = np.concatenate([self._state, low | high << WORD_BITS]), self._used + 2 * more

    def decode(self, parts: Sequence[Part]) -> list[Integers]:
        """Decodes the symbols of a group, or of the next parts of a group, after :meth:`begin`.

        Args:
            parts: The parts that were encoded, without their symbols.

        Returns:
            The symbols of each part, ``(n,)``, uint8 if the alphabet has at most 2^8 symbols and otherwise uint16.

        Raises:
            DamagedStreamError: If the data ends before the last symbol.
        """
        found = []
        for part in parts:
            symbols, self._used = _decode_part(part, self._state, self._words, self._used)
            found.append(symbols)
        return found

    def end(self) -> tuple[bytes, bytes]:
        """Returns the rest that followed the parts: the bytes that the lanes held, and the bytes after the last word.

        Raises:
            DamagedStreamError: If no lane can have begun in the state in which one ends.
        """
        if (self._state >> WORD_BITS != 1).any():
            raise DamagedStreamError("Expected all lanes to end where they began.")
        return self._state.astype("<u2").tobytes(), bytes(self._data[2 * self._used :])


def code_bits(parts: Sequence[Part], least: int = 1) -> list[float]:
    """Returns the bits of each part of a group; their sum is about that of its words, without the lanes' states.

    Args:
        parts: The parts, with their symbols.
        least: The number of lanes of the group before.
    """
    lanes = max(least, lane_count(sum(len(part.contexts) for part in parts)))
    frequencies = (_intervals(part, lanes)[1] for part in parts)
    return [float((TABLE_BITS - np.log2(frequency, dtype=np.float64)).sum()) for frequency in frequencies]


def lane_count(symbols: int) -> int:
    """Returns the number of lanes for this number of symbols, at least one."""
    return max(1, min(symbols // STEPS, FEW_LANES + symbols // MANY_STEPS))


def lanes_of(symbols: Sequence[int]) -> list[int]:
    """Returns the number of lanes of each group of so many symbols: never fewer than an earlier group has."""
    return list(accumulate(map(lane_count, symbols), max))


def _put(
    start: Integers,  # (n,)
    frequency: Integers,  # (n,)
    state: Integers,  # (lanes,)
) -> Integers:
    """Encodes symbols with these intervals: returns their words, uint16, and changes the states of the lanes."""
    lanes = len(state)
    words = [np.zeros(0, np.uint16)]  # in reverse order
    for first in reversed(range(0, len(start), lanes)):
        f = frequency[first : first + lanes]
        x = state[: len(f)]
        full = x >> _FULL_BITS >= f
        words.append(x[full].astype(np.uint16))
        np.right_shift(x, WORD_BITS, out=x, where=full)
        quotient, rest = np.divmod(x, f)
        x[:] = (quotient << TABLE_BITS) + rest + start[first : first + lanes]
    return np.concatenate(words[::-1])


def _put_singly(
    start: Integers,  # (n,)
    frequency: Integers,  # (n,)
    state: Integers,  # (lanes,)
) -> Integers:
    """Does the same as :func:`_put`, symbol by symbol."""
    states, lanes = state.tolist(), len(state)
    words = []  # in reverse order
    begins, lengths = start.tolist(), frequency.tolist()
    for i in reversed(range(len(begins))):
        x, f = states[i % lanes], lengths[i]
        if x >> _FULL_BITS >= f:
            words.append(x & _WORD)
            x >>= WORD_BITS
        states[i % lanes] = (x // f << TABLE_BITS) + x % f + begins[i]
    state[:] = states
    return np.array(words[::-1], np.uint16)


def _decode_part(part: Part, state: Integers, words: Integers, used: int) -> tuple[Integers, int]:
    """Returns the symbols of a part and the number of words used after it; changes the states of the lanes."""
    n, lanes = len(part.contexts), len(state)
    take = _take_singly if lanes < SINGLY else _take
    symbols: Integers = np.zeros(n, np.uint8 if part.alphabet <= 1 << 8 else np.uint16)
    tables = _Tables(part)
    for first, last in _segments(n, lanes):
        contexts = part.contexts[first:last].astype(np.intp)
        places, used = take(contexts, tables, state, words, used)
        tables.learn(places)
        symbols[first:last] = places - contexts * part.alphabet
    return symbols, used


def _take(
    contexts: Integers,  # (n,)
    tables: "_Tables",
    state: Integers,  # (lanes,)
    words: Integers,
    used: int,
) -> tuple[Integers, int]:
    """Decodes symbols: returns their places in the tables and the number of words used; changes the lanes' states."""
    lanes = len(state)
    bases = (contexts << TABLE_BITS).astype(np.uint32)
    places = np.zeros(len(contexts), np.intp)
    for begin in range(0, len(contexts), lanes):
        base = bases[begin : begin + lanes]
        x = state[: len(base)]
        slot = x & _SLOTS
        place = tables.ends.searchsorted(base + slot, "right")
        places[begin : begin + lanes] = place
        x >>= TABLE_BITS
        x *= tables.frequency.take(place)
        x += slot
        x -= tables.start.take(place)
        empty = (x < _LOWEST).nonzero()[0]
        if len(empty):
            if used + len(empty) > len(words):
                raise DamagedStreamError(f"Expected more than {len(words)} words.")
            x[empty] = x[empty] << WORD_BITS | words[used : used + len(empty)]
            used += len(empty)
    return places, used


def _take_singly(
    contexts: Integers,  # (n,)
    tables: "_Tables",
    state: Integers,  # (lanes,)
    words: Integers,
    used: int,
) -> tuple[Integers, int]:
    """Does the same as :func:`_take`, symbol by symbol."""
    states, lanes = state.tolist(), len(state)
    ends, frequency, start = tables.ends.tolist(), tables.frequency.tolist(), tables.start.tolist()
    coming = words[used : used + len(contexts)].tolist()  # a symbol uses at most one word
    places, first = [], used
    for i, base in enumerate((contexts << TABLE_BITS).tolist()):
        x = states[i % lanes]
        slot = x & _SLOTS
        place = bisect_right(ends, base + slot)
        x = frequency[place] * (x >> TABLE_BITS) + slot - start[place]
        if x < _LOWEST:
            if used == len(words):
                raise DamagedStreamError(f"Expected more than {len(words)} words.")
            x = x << WORD_BITS | coming[used - first]
            used += 1
        states[i % lanes] = x
        places.append(place)
    state[:] = states
    return np.array(places, np.intp), used


def _intervals(part: Part, lanes: int) -> tuple[Integers, Integers]:
    """Returns start and length of each symbol's interval, in the table of its context at its step, uint32."""
    symbols = part.symbols
    assert symbols is not None
    stretches, size = list(_segments(len(symbols), lanes)), part.tables * part.alphabet

    def places(first: int, last: int) -> Integers:
        found: Integers = part.contexts[first:last].astype(np.intp) * part.alphabet + symbols[first:last]
        return found

    seen = np.zeros((len(stretches), size), np.int64)  # counts before each stretch, so that all tables are made at once
    for i, stretch in enumerate(stretches[:-1]):
        seen[i + 1] = np.bincount(places(*stretch), minlength=size)
    counts = part.counts.reshape(-1) + INCREMENT * seen.cumsum(0)
    lengths = _frequencies(counts.reshape(-1, part.alphabet))
    starts = (lengths.cumsum(1) - lengths).reshape(-1, size)
    start, frequency = np.zeros((2, len(symbols)), np.uint32)
    for i, (first, last) in enumerate(stretches):
        start[first:last] = starts[i].take(places(first, last))
        frequency[first:last] = lengths.reshape(-1, size)[i].take(places(first, last))
    return start, frequency


def _segments(symbols: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Yields the stretches of symbols between table updates: single steps at first, later 1/16 of all earlier steps."""
    first, steps = 0, -(-symbols // lanes)
    while first < steps:
        last = min(steps, first + max(1, first // 16))
        yield first * lanes, min(symbols, last * lanes)
        first = last


class _Tables:
    """The frequencies of the symbols in all contexts of a part, learned from counts.

    Symbol s of context c is at the place ``c * alphabet + s`` of all arrays. In ``ends``, each context has a range of
    2^14 numbers of its own, so that one search finds the symbols of all lanes.
    """

    def __init__(self, part: Part) -> None:
        self._counts = part.counts
        self._bases = np.arange(part.tables)[:, None] << TABLE_BITS
        self._make()

    def learn(self, places: Integers) -> None:
        """Adds the symbols at these places to the counts, and updates the frequencies."""
        seen = np.bincount(places, minlength=self._counts.size)
        self._counts += INCREMENT * seen.reshape(self._counts.shape)
        self._make()

    def _make(self) -> None:
        frequency = _frequencies(self._counts)
        ends = frequency.cumsum(1)
        self.ends: Integers = (ends + self._bases).astype(np.uint32).reshape(-1)
        self.frequency: Integers = frequency.astype(np.uint32).reshape(-1)
        self.start: Integers = (ends - frequency).astype(np.uint32).reshape(-1)


def _frequencies(
    counts: Integers,  # (tables, alphabet)
) -> Integers:
    """Returns the frequencies of symbols with these counts, int64; the frequencies of each table add up to 2^14.

    Each symbol gets 1 and a share of the rest in proportion to its count, rounded down. The first symbol with the
    largest count gets the remainder.
    """
    rest = (1 << TABLE_BITS) - counts.shape[1]
    frequency: Integers = 1 + counts * rest // counts.sum(1, keepdims=True)
    frequency[np.arange(len(frequency)), counts.argmax(1)] += (1 << TABLE_BITS) - frequency.sum(1)
    return frequency
