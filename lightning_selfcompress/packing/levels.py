"""The classes of channels, and the counts with which the tables of their codes start.

A channel without a bound is of the class of its *level*: twice the binary logarithm of the mean magnitude of its codes,
rounded. The table of such a class starts with the frequencies of a two-sided geometric distribution of that mean
magnitude, which codes of weights roughly follow. All arithmetic is in integers, so all machines have the same tables.

A channel with a bound is of the class of its *share*: the binary logarithm of the share of its codes within the bounds.
The table of such a class starts with this share.
"""

from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_selfcompress.packing.bounds import at_bounds
from lightning_selfcompress.packing.tokens import DIRECT, TOKENS

Integers = NDArray[Any]


LOWEST_LEVEL, LEVELS = -16, 79  # mean magnitudes from 2^-8, or less, to 2^31


SHARES = 15  # shares from 2^-14 to 1


# The counts of a level's table add up to about this at the start, besides one for each symbol. Weights of many bits are
# less often distributed geometrically.
SURE, UNSURE, WIDE_LEVEL = 1024, 256, 4


ENDS = 128  # the counts of a share's table add up to about this at the start, besides one for each symbol


BITS = 64  # bits of the fractions of fixed-point numbers


def kinds_of(
    codes: Integers,  # (channels, weights per channel)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Returns a number for each channel, ``(channels,)``: channels of one tensor with the same number form a class.

    The number is 0 for channels whose codes are all 0, 1 to 79 for the levels of channels without a bound, and 80 to 94
    for the shares of channels with a bound. The number depends on no other channel.
    """
    sums, row = np.abs(codes).sum(1, dtype=np.int64), codes.shape[1]
    within = row - at_bounds(codes, bounds).sum(1)
    distinct, which = np.unique(np.where(bounds > 0, -within - 1, sums), return_inverse=True)
    kinds = [_share(-n, row + 1) if n < 0 else _level(n, row) for n in distinct.tolist()]
    return np.where(sums > 0, np.array(kinds, np.int64)[which], 0)


def _level(total: int, count: int) -> int:
    return min(max(_half_octaves(total, count) - LOWEST_LEVEL, 0), LEVELS - 1) + 1


def _share(total: int, count: int) -> int:
    return LEVELS + SHARES - min(-(_half_octaves(total, count) + 1 >> 1), SHARES - 1)


def _half_octaves(total: int, count: int) -> int:
    """Returns ``2 log2(total / count)``, rounded, in integer arithmetic that gives the same result on every machine."""
    quarters = ((total**4 << 320) // count**4).bit_length() - 321 if total else 0
    return quarters + 1 >> 1


class Classes(NamedTuple):
    """The numbers that tell of which kind each class of a tensor is; class 0 is for channels whose codes are all 0.

    Args:
        first_level: The kind of class 1, less one, if there are classes of levels.
        levels: The number of classes of levels, which are the classes from 1 on, in the order of kinds.
        first_share: The kind of the first class of a share, less the 80 of the smallest share, if there are any.
        shares: The number of classes of shares, which follow, in the order of kinds.
    """

    first_level: int = 0
    levels: int = 0
    first_share: int = 0
    shares: int = 0

    @property
    def number(self) -> int:
        """The number of classes, class 0 included."""
        return 1 + self.levels + self.shares

    def start_counts(self, alphabet: int) -> Integers:
        """Returns the counts with which the tables of all classes but 0 start, int64, ``(at least 1, alphabet)``."""
        levels = [_level_counts(self.first_level + i)[:alphabet] for i in range(self.levels)]
        shares = [_share_counts(self.first_share + i, alphabet) for i in range(self.shares)]
        return np.array([*levels, *shares] or [np.ones(alphabet, np.int64)])


def number_classes(
    kinds: Integers,  # (channels,)
    tensors: Integers,  # (channels,)
    count: int,
) -> tuple[Integers, list[Classes]]:
    """Numbers the classes of each tensor: the kinds from the least to the largest of its levels, then of its shares.

    Args:
        kinds: Kinds of the channels, from :func:`kinds_of`.
        tensors: Number of the tensor to which each channel belongs.
        count: Number of tensors.

    Returns:
        Class of each channel within its tensor, ``(channels,)``, from 0 to 94, and the classes of each tensor.
    """
    least, most = np.full((2, count), LEVELS + SHARES), np.zeros((2, count), np.int64)
    of_share = (kinds > LEVELS).astype(np.int64)
    alive = kinds > 0
    np.minimum.at(least, (of_share[alive], tensors[alive]), kinds[alive])
    np.maximum.at(most, (of_share[alive], tensors[alive]), kinds[alive])
    sizes = np.where(most > 0, most - least + 1, 0)
    first = least - 1 - np.stack([np.zeros(count, np.int64), sizes[0]])
    firsts = np.where(sizes > 0, least - [[1], [LEVELS + 1]], 0).tolist()
    classes = np.where(alive, kinds - first[of_share, tensors], 0)
    return classes, [
        Classes(*numbers) for numbers in zip(firsts[0], sizes[0].tolist(), firsts[1], sizes[1].tolist(), strict=True)
    ]


@lru_cache
def _level_counts(place: int) -> Integers:
    """Returns the counts at the start of a level's table, for all tokens and two more symbols, int64.

    With ratio r, a code k has the mass ``r^|k|``, and a token the mass of its codes, in units of 2^-64. Two tokens, one
    of either sign, have the same mass.
    """
    level = LOWEST_LEVEL + place
    ratio, mass = geometric_ratio(level), [1 << BITS]
    for _ in range(1, 8):
        mass.append(mass[-1] * ratio >> BITS)
    power, below = mass[7] * ratio >> BITS, sum(mass)  # r^8, and the mass of the codes from 0 to 7
    for _ in range(DIRECT, TOKENS, 2):
        mass.append(power * below >> BITS)
        power, below = power * power >> BITS, below + mass[-1]
    masses = [mass[0], *(m for m in mass[1:] for _ in range(2)), 0, 0]
    total, trust = sum(masses), SURE if level < WIDE_LEVEL else UNSURE
    counts = np.array([1 + trust * m // total for m in masses], np.int64)
    counts.flags.writeable = False
    return counts


def _share_counts(place: int, alphabet: int) -> Integers:
    """Returns the counts at the start of a share's table, int64, ``(alphabet,)``.

    Both bounds have the same count, and all other symbols have another one. These have ``2^(place - 14)`` of the sum.
    """
    within = ENDS >> SHARES - 1 - place
    counts = [1 + (ENDS - within) // 2] * 2 + [1 + within // max(alphabet - 2, 1)] * alphabet
    return np.array(counts[:alphabet], np.int64)


def geometric_ratio(level: int) -> int:
    """Returns the ratio r of the two-sided geometric distribution of mean magnitude ``m = 2^(level / 2)``, times 2^64.

    The probability of a code k is proportional to ``r^|k|``, and ``r = (sqrt(1 + m^2) - 1) / m``.
    """
    root, mean = isqrt((1 << 2 * BITS) + (1 << 2 * BITS + level)), isqrt(1 << 2 * BITS + level)
    return (root - (1 << BITS) << BITS) // mean
