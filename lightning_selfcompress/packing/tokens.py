"""Codes as tokens: small ones are tokens of their own, large ones share one and have extra bits.

Codes 0, 1, -1, 2, -2, ... 7, -7 are the tokens 0 to 14. A larger one of bit length k, from 4 to 31, is the token
15 + 2 (k - 4), one more if it is negative, and its lower k - 1 bits are stored beside the tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]


DIRECT = 15  # tokens that are codes of their own


_SHORTEST, _LONGEST = 4, 31  # bit lengths of codes that share their tokens


TOKENS = DIRECT + 2 * (_LONGEST - _SHORTEST + 1)


LARGEST_CODE = (1 << _LONGEST) - 1


_BLOCK = 1 << 18  # codes that get their extra bits at a time, which takes several times their memory


def _smallest() -> Integers:
    """For each token the code that is nearest to 0, ``(TOKENS,)``, int64."""
    direct = [token + 1 >> 1 if token % 2 else -(token >> 1) for token in range(DIRECT)]
    large = [sign << k - 1 for k in range(_SHORTEST, _LONGEST + 1) for sign in (1, -1)]
    return np.array(direct + large, np.int64)


_SMALLEST = _smallest()


def tokens_of(
    codes: Integers,  # (n,)
) -> Integers:
    """The token of each code, ``(n,)``, uint8. Codes lie within ``LARGEST_CODE`` of 0."""
    magnitude = np.abs(codes.astype(np.int32))
    large = np.flatnonzero(magnitude >= 1 << _SHORTEST - 1)
    tokens = (2 * np.minimum(magnitude, DIRECT) - (codes > 0)).astype(np.uint8)
    tokens[large] = DIRECT + 2 * (np.frexp(magnitude[large].astype(np.float64))[1] - _SHORTEST) + (codes[large] < 0)
    return tokens


def extra_bits(
    codes: Integers,  # (n,)
) -> bytes:
    """The lower bits of all large codes: first every code's lowest bit, then the next bit of codes that have one.

    The first bit is the highest of the first byte; the last byte is filled up with 0.
    """
    magnitude = np.abs(codes.astype(np.int32))
    magnitude = magnitude[magnitude >= 1 << _SHORTEST - 1]
    bits = [np.zeros(0, np.uint8)]
    for place in range(_LONGEST - 1):
        magnitude = magnitude[magnitude >> place > 1]
        bits.append((magnitude >> place & 1).astype(np.uint8))
    return np.packbits(np.concatenate(bits)).tobytes()


def extra_nbytes(
    tokens: Integers,  # (n,)
) -> int:
    """How many bytes :func:`extra_bits` has for the codes of these tokens."""
    return -(-int(extra_bit_counts(tokens[tokens >= DIRECT]).sum(dtype=np.int64)) // 8)


def join_tokens(
    tokens: Integers,  # (n,)
    extra: bytes,
) -> Integers:
    """The codes of tokens and the bytes of :func:`extra_bits`, ``(n,)``, in the narrowest signed type for them."""
    widest = int(tokens.max(initial=0))
    small = np.int8 if widest < DIRECT + 2 * (8 - _SHORTEST) else np.int16
    codes: Integers = _SMALLEST.astype(small if widest < DIRECT + 2 * (16 - _SHORTEST) else np.int32).take(tokens)
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(tokens), _BLOCK)]
    counts = np.array([_codes_with_bit(tokens[block]) for block in blocks]).reshape(-1, _LONGEST - 1)
    ends = counts.T.cumsum().reshape(counts.T.shape).T  # planes one after the other, each with its blocks in order
    bits = np.frombuffer(extra, np.uint8)
    for block, firsts, lasts in zip(blocks, ends - counts, ends, strict=True):
        _add_bits(codes[block], tokens[block], bits, firsts, lasts)
    return codes


def _codes_with_bit(tokens: Integers) -> Integers:
    """How many codes have an extra bit at each place, ``(places,)``."""
    of_width: Integers = np.bincount(extra_bit_counts(tokens[tokens >= DIRECT]), minlength=_LONGEST)
    return of_width[::-1].cumsum()[-2::-1]


def _add_bits(codes: Integers, tokens: Integers, bits: Integers, firsts: Integers, lasts: Integers) -> None:
    """Adds a block's extra bits, which lie from the first to the last of each plane, to its codes, in place."""
    which = np.flatnonzero(tokens >= DIRECT)
    widths = extra_bit_counts(tokens[which])
    for place in range(int(widths.max(initial=0))):
        which = which[widths > place]
        widths = widths[widths > place]
        first, last = int(firsts[place]), int(lasts[place])
        plane = np.unpackbits(bits[first // 8 : -(-last // 8)])[first % 8 :][: last - first]
        bit = plane.astype(codes.dtype) << place
        codes[which] += np.where(tokens[which] % 2 == 1, bit, -bit)


def extra_bit_counts(
    large: Integers,  # (n,)
) -> Integers:
    """How many extra bits each large token has, ``(n,)``, uint8."""
    return (large.astype(np.uint8) - DIRECT) // 2 + (_SHORTEST - 1)
