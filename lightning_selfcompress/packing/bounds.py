"""Symbols for the codes at the bounds of a channel.

In a strongly clipped channel, most codes lie at a bound, and take about one bit each with these symbols.

A channel of bound k > 0 has the clip range from -k to k - 1. The symbol of the code -k is 0, and the symbol of the
code k - 1 is 1. The symbol of any other code is its token plus 2. In a channel of bound 0, all symbols are tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]


LARGEST_BOUND = (1 << 12) - 1


LOW, HIGH, WITHIN = 0, 1, 2  # symbols of a channel with a bound: its two ends; tokens begin at WITHIN


def bounds_of(
    codes: Integers,  # (channels, weights per channel)
) -> Integers:
    """Returns the bound of each channel, ``(channels,)``; 0 for a channel with few codes at its bounds.

    A channel has a bound if at least 16 codes and at least three eighths of its codes lie at the two ends. Bound 1,
    which is for the codes -1 and 0, is not used because it does not save bits.
    """
    if not codes.size:
        return np.zeros(len(codes), np.int64)
    low, high = codes.min(1).astype(np.int64), codes.max(1).astype(np.int64)
    bounds = np.maximum(-low, high + 1)
    many = at_bounds(codes, bounds).sum(1) >= max(16, 3 * codes.shape[1] / 8)
    return np.where(many & (bounds > 1) & (bounds <= LARGEST_BOUND), bounds, 0)


def at_bounds(
    codes: Integers,  # (channels, weights per channel)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Marks the codes at the ends of their channel's range, ``(channels, weights per channel)``; none for bound 0."""
    ends = bounds[:, None].astype(np.int32)
    found: Integers = (ends > 0) & ((codes == -ends) | (codes == ends - 1))
    return found


def to_symbols(
    tokens: Integers,  # (weights per channel, channels)
    codes: Integers,  # (weights per channel, channels)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Returns the symbols of codes with these tokens, uint8, ``(weights per channel, channels)``."""
    if not bounds.any():
        return tokens
    ends = bounds.astype(np.int32)
    symbols = tokens + WITHIN * (bounds > 0).astype(np.uint8)
    symbols[(ends > 0) & (codes == -ends)] = LOW
    symbols[(ends > 0) & (codes == ends - 1)] = HIGH
    return symbols


def to_tokens(
    symbols: Integers,  # (weights per channel, channels)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Returns the tokens of symbols, uint8, ``(weights per channel, channels)``; a symbol at a bound has token 0."""
    if not bounds.any():
        return symbols
    less = WITHIN * (bounds > 0).astype(np.uint8)
    return np.where(symbols >= less, symbols - less, 0).astype(np.uint8)


def put_bounds(
    codes: Integers,  # (weights per channel, channels)
    symbols: Integers,  # (weights per channel, channels)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Replaces codes whose symbols are at a bound by the bound, in the narrowest signed dtype of all magnitudes.

    The codes may be changed in place.
    """
    largest = int(bounds.max(initial=0))
    if not largest:
        return codes
    found = codes.astype(np.promote_types(codes.dtype, np.int8 if largest < 1 << 7 else np.int16), copy=False)
    ends = bounds.astype(found.dtype)
    np.copyto(found, -ends, where=(ends > 0) & (symbols == LOW))
    np.copyto(found, ends - found.dtype.type(1), where=(ends > 0) & (symbols == HIGH))
    if codes.dtype == np.int8 and largest == 1 << 7 and int(found.min()) > -largest:  # the channel has 127, not -128
        return found.astype(np.int8)
    return found
