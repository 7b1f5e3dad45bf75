"""Entropy coding with tables that both sides learn as they go: asymmetric numeral systems over many lanes.

Symbols are dealt out to lanes in turn, and all lanes take one step at a time, so that numpy does the work. Tables are
made anew from all symbols seen, at steps both sides know; nothing of them is stored. All arithmetic is in integers.

Source: Duda, "Asymmetric numeral systems", 2013, arXiv 1311.2540; interleaved as in Giesen, arXiv 1402.3392.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]  # of any width

TABLE_BITS = 14  # the frequencies of a context add up to 2^14
WORD_BITS = 16  # a lane's state lies in [2^16, 2^32) and is filled up from words of 16 bits
STEPS = 2048  # symbols that a lane codes at least, where there are several: its state costs 4 bytes
INCREMENT = 3  # what a symbol seen adds to its count, which starts at 1
LARGEST_ALPHABET = 1 << 13
_LOWEST = 1 << WORD_BITS


class DamagedStreamError(ValueError):
    """Words that no encoder wrote."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of symbols of one kind, with tables of its own.

    Args:
        contexts: Which of the tables each symbol is coded with, ``(n,)``, from 0 on.
        tables: Number of tables.
        alphabet: Number of different symbols there may be, from 1 to 2^13.
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
    lanes = lane_count(parts)
    state = np.full(lanes, _LOWEST, np.int64)
    words = []
    for part in reversed(parts):
        start, frequency = _intervals(part, lanes)
        for step in range(-(-len(start) // lanes) - 1, -1, -1):
            here = slice(step * lanes, (step + 1) * lanes)
            f = frequency[here].astype(np.int64)
            x = state[: len(f)]
            full = x >= f << (2 * WORD_BITS - TABLE_BITS)
            words.append((x[full] & (_LOWEST - 1))[::-1])
            x = np.where(full, x >> WORD_BITS, x)
            quotient = x // f
            state[: len(f)] = (quotient << TABLE_BITS) + x - quotient * f + start[here]
    stream = np.concatenate(words)[::-1] if words else np.zeros(0, np.int64)
    return state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(data: bytes, parts: Sequence[Part]) -> list[Integers]:
    """The inverse of :func:`encode`.

    Args:
        data: What it returned, nothing before it and nothing after.
        parts: As there, without their symbols.

    Returns:
        The symbols of each part, ``(n,)`` uint16.

    Raises:
        DamagedStreamError: If these are not the bytes of so many symbols.
    """
    lanes = lane_count(parts)
    if len(data) < 4 * lanes or len(data) % 2:
        raise DamagedStreamError(f"Expected at least {4 * lanes} bytes, an even number, got {len(data)}.")
    state = np.frombuffer(data, "<u4", lanes).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
    used, found = 0, []
    for part in parts:
        symbols, used = _decode_part(part, state, words, used)
        found.append(symbols)
    if used != len(words) or (state != _LOWEST).any():
        raise DamagedStreamError("Expected all words to be used and all lanes to end where they began.")
    return found


def code_bits(parts: Sequence[Part]) -> list[float]:
    """Bits that each part takes; in all what :func:`encode` writes but for the lanes' states.

    Args:
        parts: With their symbols.
    """
    lanes = lane_count(parts)
    frequencies = (_intervals(part, lanes)[1] for part in parts)
    return [float((TABLE_BITS - np.log2(frequency)).sum()) for frequency in frequencies]


def lane_count(parts: Sequence[Part]) -> int:
    """Lanes for the symbols of all parts, at least one."""
    return max(1, sum(len(part.contexts) for part in parts) // STEPS)


def _decode_part(part: Part, state: Integers, words: Integers, used: int) -> tuple[Integers, int]:
    """The symbols of a part and how many words are used after it; changes the states of the lanes."""
    n, lanes = len(part.contexts), len(state)
    symbols: Integers = np.zeros(n, np.uint16)
    tables = _Tables(part)
    for first, last in _segments(-(-n // lanes)):
        for step in range(first, last):
            here = slice(step * lanes, (step + 1) * lanes)
            c = part.contexts[here]
            x = state[: len(c)]
            slot = x & ((1 << TABLE_BITS) - 1)
            s = (tables.ends[c] <= slot[:, None]).sum(1)
            symbols[here] = s
            x = tables.frequency[c, s] * (x >> TABLE_BITS) + slot - tables.start[c, s]
            empty = np.flatnonzero(x < _LOWEST)
            if used + len(empty) > len(words):
                raise DamagedStreamError(f"Expected more than {len(words)} words.")
            x[empty] = (x[empty] << WORD_BITS) | words[used : used + len(empty)]
            used += len(empty)
            state[: len(c)] = x
        seen = slice(first * lanes, last * lanes)
        tables.learn(symbols[seen], part.contexts[seen])
    return symbols, used


def _intervals(part: Part, lanes: int) -> tuple[Integers, Integers]:
    """Start and length of each symbol's interval in the table of its context at its step."""
    assert part.symbols is not None
    start, frequency = np.zeros((2, len(part.symbols)), np.int32)
    tables = _Tables(part)
    for first, last in _segments(-(-len(part.symbols) // lanes)):
        here = slice(first * lanes, last * lanes)
        s, c = part.symbols[here], part.contexts[here]
        start[here], frequency[here] = tables.start[c, s], tables.frequency[c, s]
        tables.learn(s, c)
    return start, frequency


def _segments(steps: int) -> Iterator[tuple[int, int]]:
    """Stretches of a part's steps with the same tables: single steps at first, then a sixteenth of all before."""
    first = 0
    while first < steps:
        last = min(steps, first + max(1, first // 16))
        yield first, last
        first = last


class _Tables:
    """Frequencies of the symbols in all contexts of a part, learned from counts."""

    def __init__(self, part: Part) -> None:
        self._counts = np.ones((part.tables, part.alphabet), np.int64)
        self._make()

    def learn(self, symbols: Integers, contexts: Integers) -> None:
        """Takes symbols into account, each in its context."""
        places = contexts.astype(np.int64) * self._counts.shape[1] + symbols
        seen = np.bincount(places, minlength=self._counts.size)
        self._counts += INCREMENT * seen.reshape(self._counts.shape)
        self._make()

    def _make(self) -> None:
        """Every symbol gets 1, the rest goes by counts, what is left over to the first of the most frequent."""
        rest = (1 << TABLE_BITS) - self._counts.shape[1]
        frequency = 1 + self._counts * rest // self._counts.sum(1, keepdims=True)
        frequency[np.arange(len(frequency)), self._counts.argmax(1)] += (1 << TABLE_BITS) - frequency.sum(1)
        self.frequency: Integers = frequency
        self.ends: Integers = frequency.cumsum(1)
        self.start: Integers = self.ends - frequency
