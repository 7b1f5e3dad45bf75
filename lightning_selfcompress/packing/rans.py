"""Entropy coding with tables that both sides learn as they go: asymmetric numeral systems over many lanes.

Symbols are dealt out to lanes in turn, and all lanes take one step at a time, so that numpy does the work. Tables are
made anew from all symbols seen, at steps both sides know; nothing of them is stored. All arithmetic is in integers.

Source: Duda, "Asymmetric numeral systems", 2013, arXiv 1311.2540; interleaved as in Giesen, arXiv 1402.3392.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]  # of any width


TABLE_BITS = 14  # the frequencies of a context add up to 2^14


WORD_BITS = 16  # a lane's state lies in [2^16, 2^32) and is filled up from words of 16 bits


STEPS, MANY_STEPS = 2048, 16384  # symbols for one lane more, which costs 3 bytes, up to FEW_LANES and beyond them


FEW_LANES = 64  # their first step is coded without anything learned; more lanes are for speed only


INCREMENT = 3  # what a symbol seen adds to its count, which starts at 1


SINGLY = 16  # fewer lanes than that go faster number by number than as arrays


_LOWEST = 1 << WORD_BITS


_SLOTS, _WORD = (1 << TABLE_BITS) - 1, (1 << WORD_BITS) - 1


_FULL_BITS = 2 * WORD_BITS - TABLE_BITS  # a state at or above f * 2^18 has no room for a symbol of frequency f


class DamagedStreamError(ValueError):
    """Words that no encoder wrote."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of symbols of one kind, with tables of its own.

    Args:
        contexts: Which of the tables each symbol is coded with, ``(n,)``, from 0 on.
        tables: Number of tables.
        alphabet: Number of different symbols there may be, from 1 to 2^13, which leaves half of a table to the counts.
        symbols: ``(n,)``, each from 0 to ``alphabet - 1``; None where they are to be decoded.
    """

    contexts: Integers
    tables: int
    alphabet: int
    symbols: Integers | None = None


def encode(parts: Sequence[Part]) -> bytes:
    """Codes the symbols of all parts, one part after the other.

    Args:
        parts: With their symbols.

    Returns:
        The states of all lanes, then the words, little-endian.
    """
    lanes = lane_count(sum(len(part.contexts) for part in parts))
    state = np.full(lanes, _LOWEST, np.uint32)
    put = _put_singly if lanes < SINGLY else _put
    words = [put(*_intervals(part, lanes), state) for part in reversed(parts)]
    stream = np.concatenate([*words[::-1], np.zeros(0, np.uint16)])
    return state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(data: bytes, parts: Sequence[Part]) -> list[Integers]:
    """The inverse of :func:`encode`.

    Args:
        data: What it returned, nothing before it and nothing after.
        parts: As there, without their symbols.

    Returns:
        The symbols of each part, ``(n,)``, uint8 if they fit and otherwise uint16.

    Raises:
        DamagedStreamError: If the bytes do not decode to that number of symbols.
    """
    lanes = lane_count(sum(len(part.contexts) for part in parts))
    check_length(data, lanes)
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32)
    used, found = 0, []
    for part in parts:
        symbols, used = _decode_part(part, state, words, used)
        found.append(symbols)
    if used != len(words) or (state != _LOWEST).any():
        raise DamagedStreamError("Expected all words to be used and all lanes to end where they began.")
    return found


def check_length(data: bytes, lanes: int) -> None:
    """Asks for the states of all lanes and whole words; so a short file is known before room is made for its symbols.

    Args:
        data: What is to be decoded.
        lanes: Of all its symbols, by :func:`lane_count`.

    Raises:
        DamagedStreamError: If it is too short, or has half a word.
    """
    if len(data) < 4 * lanes or len(data) % 2:
        raise DamagedStreamError(f"Expected at least {4 * lanes} bytes, an even number, got {len(data)}.")


def code_bits(parts: Sequence[Part]) -> list[float]:
    """Bits that each part takes; in all what :func:`encode` writes but for the lanes' states.

    Args:
        parts: With their symbols.
    """
    lanes = lane_count(sum(len(part.contexts) for part in parts))
    frequencies = (_intervals(part, lanes)[1] for part in parts)
    return [float((TABLE_BITS - np.log2(frequency, dtype=np.float64)).sum()) for frequency in frequencies]


def lane_count(symbols: int) -> int:
    """Lanes for so many symbols, at least one."""
    return max(1, min(symbols // STEPS, FEW_LANES + symbols // MANY_STEPS))


def _put(
    start: Integers,  # (n,)
    frequency: Integers,  # (n,)
    state: Integers,  # (lanes,)
) -> Integers:
    """The words of a part whose symbols have these intervals, uint16; changes the states of the lanes."""
    lanes = len(state)
    words = [np.zeros(0, np.uint16)]  # the last one first
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
    """The same as :func:`_put`, symbol by symbol."""
    states, lanes = state.tolist(), len(state)
    words = []  # the last one first
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
    """The symbols of a part and how many words are used after it; changes the states of the lanes."""
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
    """Places of the next symbols in the tables, and how many words are used then; changes the states of the lanes."""
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
    """The same as :func:`_take`, symbol by symbol."""
    states, lanes = state.tolist(), len(state)
    ends, frequency, start = tables.ends.tolist(), tables.frequency.tolist(), tables.start.tolist()
    coming = words[used : used + len(contexts)].tolist()  # a symbol takes one at most
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
    """Start and length of each symbol's interval in the table of its context at its step, uint32."""
    symbols = part.symbols
    assert symbols is not None
    stretches, size = list(_segments(len(symbols), lanes)), part.tables * part.alphabet

    def places(first: int, last: int) -> Integers:
        found: Integers = part.contexts[first:last].astype(np.intp) * part.alphabet + symbols[first:last]
        return found

    seen = np.zeros((len(stretches), size), np.int64)  # before each stretch; so all tables are made at once
    for i, stretch in enumerate(stretches[:-1]):
        seen[i + 1] = np.bincount(places(*stretch), minlength=size)
    lengths = _frequencies(1 + INCREMENT * seen.cumsum(0).reshape(-1, part.alphabet))
    starts = (lengths.cumsum(1) - lengths).reshape(-1, size)
    start, frequency = np.zeros((2, len(symbols)), np.uint32)
    for i, (first, last) in enumerate(stretches):
        start[first:last] = starts[i].take(places(first, last))
        frequency[first:last] = lengths.reshape(-1, size)[i].take(places(first, last))
    return start, frequency


def _segments(symbols: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Stretches of a part with the same tables: single steps at first, then a sixteenth of all steps before."""
    first, steps = 0, -(-symbols // lanes)
    while first < steps:
        last = min(steps, first + max(1, first // 16))
        yield first * lanes, min(symbols, last * lanes)
        first = last


class _Tables:
    """Frequencies of the symbols in all contexts of a part, learned from counts.

    Symbol s of context c is at the place ``c * alphabet + s`` of all arrays. Intervals of different contexts lie in
    different stretches of 2^14 in ``ends``, so that one search finds the symbols of all lanes.
    """

    def __init__(self, part: Part) -> None:
        self._counts = np.ones((part.tables, part.alphabet), np.int64)
        self._bases = np.arange(part.tables)[:, None] << TABLE_BITS
        self._make()

    def learn(self, places: Integers) -> None:
        """Takes symbols into account that were seen at these places."""
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
    """Every symbol gets 1, the rest goes by counts, what is left over to the first of the most frequent; int64."""
    rest = (1 << TABLE_BITS) - counts.shape[1]
    frequency: Integers = 1 + counts * rest // counts.sum(1, keepdims=True)
    frequency[np.arange(len(frequency)), counts.argmax(1)] += (1 << TABLE_BITS) - frequency.sum(1)
    return frequency
