"""Tokens: codes of any size are one token each, and extra bits if they are large."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.packing.tokens import LARGEST_CODE, TOKENS, extra_bits, extra_nbytes, join_tokens, tokens_of

CODES = st.one_of(
    st.lists(st.integers(-LARGEST_CODE, LARGEST_CODE), max_size=50),
    st.lists(st.integers(-9, 9), max_size=50),
    st.lists(st.integers(0, 31).flatmap(lambda k: st.sampled_from([(1 << k) - 1, -(1 << k) + 1])), max_size=50),
    st.lists(st.integers(0, 30).flatmap(lambda k: st.sampled_from([1 << k, -(1 << k)])), max_size=50),
)


@given(CODES)
def test_codes_come_back(values):
    """Tokens and extra bits make up the codes, in the narrowest type for them."""
    codes = np.array(values, np.int64)
    tokens, extra = tokens_of(codes), extra_bits(codes)
    assert len(extra) == extra_nbytes(tokens)
    joined = join_tokens(tokens, extra)
    assert joined.tolist() == values
    largest = max(map(abs, values), default=0)
    assert joined.dtype == (np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32)


def test_small_codes_are_tokens():
    """0, 1, -1, ... 7, -7 are the tokens 0 to 14 and have no extra bits."""
    codes = np.array([0, *(sign * n for n in range(1, 8) for sign in (1, -1))])
    assert tokens_of(codes).tolist() == list(range(15))
    assert extra_bits(codes) == b""


def test_large_codes_share_tokens():
    """8 to 15 are token 15, -8 to -15 are 16, and so on up to 31 bits."""
    assert tokens_of(np.array([8, 15, -8, -15, 16, -31, 32])).tolist() == [15, 15, 16, 16, 17, 18, 19]
    assert tokens_of(np.array([LARGEST_CODE, -LARGEST_CODE])).tolist() == [TOKENS - 2, TOKENS - 1]


def test_extra_bits_lie_in_planes():
    """The lowest bit of all large codes comes first, then the next of those that have it."""
    codes = np.array([9, 0, -12, 16 + 0b1010])  # lower bits 001, 100 and 1010
    assert extra_bits(codes) == bytes([0b100_001_01, 0b0_1_000000])
