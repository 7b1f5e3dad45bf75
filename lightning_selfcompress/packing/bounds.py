"""Codes at the bounds of a channel: most of a channel that was clipped hard are, and take about a bit each.

A channel of bound k > 0 has the symbols 0 for the code -k and 1 for k - 1, the two ends of a clip range, and for codes
within 2 more than their token. A channel of bound 0 has none, and its symbols are tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]


LARGEST_BOUND = (1 << 12) - 1


LOW, HIGH, WITHIN = 0, 1, 2  # symbols of a channel that has a bound: at either end; at this one and above, tokens


def bounds_of(
    codes: Integers,  # (channels, weights per channel)
) -> Integers:
    """The bounds of channels with at least 16 and three eighths of their codes at the ends, ``(channels,)``; else 0.

    A bound of 1, codes -1 and 0, is not worth its symbols.
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
    """Which codes lie at the ends of their channel's range, ``(channels, weights per channel)``; none at bound 0."""
    ends = bounds[:, None].astype(np.int32)
    found: Integers = (ends > 0) & ((codes == -ends) | (codes == ends - 1))
    return found


def to_symbols(
    tokens: Integers,  # (weights per channel, channels)
    codes: Integers,  # (weights per channel, channels)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Symbols of codes from their tokens, uint8, ``(weights per channel, channels)``."""
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
    """The tokens of symbols, uint8, ``(weights per channel, channels)``; symbols at a bound have code 0's."""
    if not bounds.any():
        return symbols
    less = WITHIN * (bounds > 0).astype(np.uint8)
    return np.where(symbols >= less, symbols - less, 0).astype(np.uint8)


def put_bounds(
    codes: Integers,  # (weights per channel, channels)
    symbols: Integers,  # (weights per channel, channels)
    bounds: Integers,  # (channels,)
) -> Integers:
    """The codes with the bounds in place of zeros, in the narrowest signed type that holds all; may be in place."""
    largest = int(bounds.max(initial=0))
    if not largest:
        return codes
    found = codes.astype(np.promote_types(codes.dtype, np.int8 if largest < 1 << 7 else np.int16), copy=False)
    ends = bounds.astype(found.dtype)
    np.copyto(found, -ends, where=(ends > 0) & (symbols == LOW))
    np.copyto(found, ends - found.dtype.type(1), where=(ends > 0) & (symbols == HIGH))
    if codes.dtype == np.int8 and largest == 1 << 7 and int(found.min()) > -largest:  # 127 is the end that is there
        return found.astype(np.int8)
    return found
