"""Codes as tokens: small ones are tokens of their own, large ones share one and have extra bits.

Codes 0, 1, -1, 2, -2, ... 7, -7 are the tokens 0 to 14. A larger one of bit length k >= 4 is the token
15 + 2 (k - 4), one more if it is negative, and its lower k - 1 bits follow in a stream of their own, the highest first.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]

DIRECT = 15  # tokens that are codes of their own
_SHORTEST = 4  # bit length of the smallest code that shares its token


def tokens_of(
    codes: Integers,  # (n,)
) -> Integers:
    """The token of each code, ``(n,)``, uint8."""
    magnitude = np.abs(codes.astype(np.int32))
    tokens = 2 * magnitude - (codes > 0)
    large = np.flatnonzero(tokens >= DIRECT)
    lengths = np.frexp(magnitude[large])[1]
    tokens[large] = DIRECT + 2 * (lengths - _SHORTEST) + (codes[large] < 0)
    return tokens.astype(np.uint8)


def extra_bits(
    codes: Integers,  # (n,)
) -> bytes:
    """The lower bits of all large codes, one after the other, filled up to whole bytes with 0."""
    magnitude = np.abs(codes.astype(np.int32))
    magnitude = magnitude[magnitude >= 1 << _SHORTEST - 1]
    widths = np.frexp(magnitude)[1] - 1
    which, place = _places(widths)
    return np.packbits(magnitude[which] >> (widths[which] - 1 - place) & 1).tobytes()


def extra_nbytes(*tokens: Integers) -> int:
    """How many bytes :func:`extra_bits` has for codes of all these tokens, each ``(n,)``."""
    return -(-sum(int(extra_bit_counts(t).sum()) for t in tokens) // 8)


def join_tokens(
    tokens: Integers,  # (n,)
    extra: bytes,
) -> Integers:
    """The codes, ``(n,)``, int32, of tokens and the bytes of :func:`extra_bits`."""
    tokens = tokens.astype(np.int32)
    codes = np.where(tokens % 2 == 1, tokens + 1 >> 1, -(tokens >> 1))
    large = np.flatnonzero(tokens >= DIRECT)
    widths = extra_bit_counts(tokens)
    which, place = _places(widths)
    bits = np.unpackbits(np.frombuffer(extra, np.uint8), count=len(which)).astype(np.int64)
    low = np.bincount(which, bits << (widths[which] - 1 - place), minlength=len(large)).astype(np.int64)
    magnitude = (1 << widths.astype(np.int64)) + low
    codes[large] = np.where((tokens[large] - DIRECT) % 2 == 1, -magnitude, magnitude)
    return codes


def extra_bit_counts(tokens: Integers) -> Integers:
    """How many extra bits each of the large tokens has, in their order."""
    large = tokens[tokens >= DIRECT].astype(np.int64)
    return (large - DIRECT) // 2 + _SHORTEST - 1


def _places(widths: Integers) -> tuple[Integers, Integers]:
    """For each bit, of which number it is and its place in it."""
    which = np.repeat(np.arange(len(widths)), widths)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(widths) - widths, widths)
