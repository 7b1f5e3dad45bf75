"""Tokens of codes: each small code has a token of its own; large codes share tokens and have extra bits.

The codes 0, 1, -1, 2, -2, ... 7, -7 have the tokens 0 to 14. A larger code of bit length k, from 4 to 31, has the token
15 + 2 (k - 4), or one more if it is negative. The lower k - 1 bits of its magnitude are stored apart from the tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]


DIRECT = 15  # number of tokens that stand for one code each


_SHORTEST, _LONGEST = 4, 31  # bit lengths of large codes


TOKENS = DIRECT + 2 * (_LONGEST - _SHORTEST + 1)


LARGEST_CODE = (1 << _LONGEST) - 1


_BLOCK = 1 << 18  # codes that get their extra bits together, which needs several times the memory of these codes


def _smallest() -> Integers:
    """Returns the code nearest to 0 of each token, ``(TOKENS,)``, int64."""
    direct = [token + 1 >> 1 if token % 2 else -(token >> 1) for token in range(DIRECT)]
    large = [sign << k - 1 for k in range(_SHORTEST, _LONGEST + 1) for sign in (1, -1)]
    return np.array(direct + large, np.int64)


_SMALLEST = _smallest()


def tokens_of(
    codes: Integers,  # (n,)
) -> Integers:
    """Returns the token of each code, ``(n,)``, uint8. The magnitude of a code is at most ``LARGEST_CODE``."""
    magnitude = np.abs(codes.astype(np.int32))
    large = np.flatnonzero(magnitude >= 1 << _SHORTEST - 1)
    tokens = (2 * np.minimum(magnitude, DIRECT) - (codes > 0)).astype(np.uint8)
    tokens[large] = DIRECT + 2 * (np.frexp(magnitude[large].astype(np.float64))[1] - _SHORTEST) + (codes[large] < 0)
    return tokens


def extra_bits(
    codes: Integers,  # (n,)
) -> bytes:
    """Packs the lower bits of all large codes: first the lowest bit of each, then the next bit of those with more bits.

    The first bit is the highest bit of the first byte, and the last byte is filled up with zeros.
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
    """Returns how many bytes :func:`extra_bits` returns for codes with these tokens."""
    return -(-int(extra_bit_counts(tokens[tokens >= DIRECT]).sum(dtype=np.int64)) // 8)


def join_tokens(
    tokens: Integers,  # (n,)
    extra: bytes,
) -> Integers:
    """Joins tokens and :func:`extra_bits` to codes, ``(n,)``, in the narrowest signed dtype for all magnitudes."""
    widest = int(tokens.max(initial=0))
    small = np.int8 if widest < DIRECT + 2 * (8 - _SHORTEST) else np.int16
    codes: Integers = _SMALLEST.astype(small if widest < DIRECT + 2 * (16 - _SHORTEST) else np.int32).take(tokens)
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(tokens), _BLOCK)]
    counts = np.array([_codes_with_bit(tokens[block]) for block in blocks]).reshape(-1, _LONGEST - 1)
    ends = counts.T.cumsum().reshape(counts.T.shape).T  # bits lie plane by plane, then block by block
    bits = np.frombuffer(extra, np.uint8)
    for block, firsts, lasts in zip(blocks, ends - counts, ends, strict=True):
        _add_bits(codes[block], tokens[block], bits, firsts, lasts)
    return codes


def _codes_with_bit(tokens: Integers) -> Integers:
    """Counts the codes that have an extra bit at each place, ``(places,)``."""
    of_width: Integers = np.bincount(extra_bit_counts(tokens[tokens >= DIRECT]), minlength=_LONGEST)
    return of_width[::-1].cumsum()[-2::-1]


def _add_bits(codes: Integers, tokens: Integers, bits: Integers, firsts: Integers, lasts: Integers) -> None:
    """Adds the extra bits of a block to its codes, in place; the bits of each plane lie from its first to its last."""
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
    """Returns the number of extra bits of each large token, ``(n,)``, uint8."""
    return (large.astype(np.uint8) - DIRECT) // 2 + (_SHORTEST - 1)
