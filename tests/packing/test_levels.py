"""The levels and shares of channels: their tables start with what the codes are likely to be."""

import numpy as np
import pytest

from lightning_selfcompress.packing import rans
from lightning_selfcompress.packing.bounds import WITHIN, bounds_of, to_symbols
from lightning_selfcompress.packing.levels import (
    BITS,
    LEVELS,
    LOWEST_LEVEL,
    SHARES,
    Classes,
    geometric_ratio,
    kinds_of,
    number_classes,
)
from lightning_selfcompress.packing.tokens import TOKENS, tokens_of


@pytest.mark.parametrize("level", range(LOWEST_LEVEL, 20))
def test_the_ratio_has_the_mean_magnitude_of_the_level(level):
    """The two-sided geometric distribution of ratio r has the mean magnitude 2 r / (1 - r^2)."""
    r = geometric_ratio(level) / 2**BITS
    assert 2 * r / (1 - r**2) == pytest.approx(2 ** (level / 2), rel=1e-9)


def test_all_tables_can_be_made():
    """Every level and share has a table of any alphabet, of counts from 1 on that fit the coder."""
    for alphabet in (1, 2, 3, 20, TOKENS + WITHIN):
        counts = Classes(0, LEVELS, 0, SHARES).start_counts(alphabet)
        assert counts.shape == (LEVELS + SHARES, alphabet)
        assert counts.min() >= 1
        assert counts.sum(1).max() < 1 << 12
    assert Classes().start_counts(7).tolist() == [[1] * 7]


def bits(codes):
    """The bits of a few codes of one channel, by the table of its class, and by a table that knows nothing."""
    rows = np.array(codes)[None]
    bounds = bounds_of(rows)
    kinds = number_classes(kinds_of(rows, bounds), np.zeros(1, int), 1)[1][0]
    assert kinds.number == 2
    symbols = to_symbols(tokens_of(rows.reshape(-1)).reshape(-1, 1), rows.T, bounds).reshape(-1)
    alphabet = int(symbols.max()) + 1
    starts = kinds.start_counts(alphabet), None
    return [sum(rans.code_bits([rans.Part(symbols * 0, 1, alphabet, symbols, start)])) for start in starts]


@pytest.mark.parametrize("mean", [0.05, 0.3, 1.0, 4.0])
def test_codes_of_a_level_are_expected(mean):
    """A hundred geometric codes take fewer bits from the table of their level."""
    ratio = (np.sqrt(1 + mean**2) - 1) / mean
    random = np.random.default_rng(1)
    told, not_told = bits(random.geometric(1 - ratio, 100) - random.geometric(1 - ratio, 100))
    assert told < not_told


def test_codes_at_bounds_are_expected():
    """A hundred codes, most of them at their bounds, take fewer bits from the table of their share."""
    told, not_told = bits([-4, 3, 3, -4, 3, -4, -4, 3, 0, 2] * 10)
    assert told < not_told
