"""The entropy coder: what is decoded is what was encoded, in as many bits as counted."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.packing import rans


def part(n, alphabet, tables, skew, seed, start=False):
    """Random symbols; with a large skew nearly all are 0, with 0 all are equally likely."""
    random = np.random.default_rng(seed)
    contexts = random.integers(0, tables, n)
    symbols = (alphabet * random.random(n) ** (1 + skew)).astype(int)
    return rans.Part(
        contexts, tables, alphabet, symbols, random.integers(1, 500, (tables, alphabet)) if start else None
    )


PARTS = st.builds(
    part,
    st.integers(0, 300),
    st.sampled_from([1, 2, 3, 16, 71, 300, 1 << 13]),
    st.integers(1, 6),
    st.sampled_from([0, 3, 50]),
    st.integers(0, 1000),
    st.booleans(),
)
GROUPS = st.lists(st.lists(PARTS, max_size=3), min_size=1, max_size=3)
MANY_LANES = {
    "two lanes": [part(4096, 5, 1, 1, 0)],
    "an uneven last step": [part(20_001, 31, 6, 3, 1)],
    "parts shorter than a step": [part(n, 7, 2, 1, n) for n in (40_000, 3, 0, 19, 21)],
    "more lanes than 64": [part(150_000, 31, 3, 3, 2), part(50_000, 2, 1, 50, 3)],
    "all the same": [part(100_000, 1, 1, 0, 0), part(100_000, 2, 1, 1000, 0)],
    "a large alphabet": [part(9000, 1 << 13, 1, 1, 4)],
}


def without_symbols(parts):
    return [rans.Part(p.contexts, p.tables, p.alphabet, None, p.start) for p in parts]


def decoded(data, groups):
    """The symbols of all parts, and the bytes that follow them."""
    decoder = rans.Decoder(data)
    found = []
    for parts in groups:
        decoder.begin(sum(len(p.contexts) for p in parts))
        found += decoder.decode(without_symbols(parts))
    return found, b"".join(decoder.end())


WAYS = [0, 1 << 40]  # all lanes as arrays, all number by number


def assert_decoded(groups, rest=b""):
    data = rans.encode(groups, rest)
    lanes = rans.lanes_of([sum(len(p.contexts) for p in parts) for parts in groups])
    for singly in WAYS:
        with patch.object(rans, "SINGLY", singly):
            found, after = decoded(data, groups)
            assert [s.tolist() for s in found] == [p.symbols.tolist() for parts in groups for p in parts]
            assert after == rest.ljust(2 * lanes[-1], b"\0")
            assert rans.encode(groups, rest) == data
    # a lane's last state holds up to 16 bits besides; rounding within states makes less than a hundredth
    bits = sum(sum(rans.code_bits(parts, least)) for parts, least in zip(groups, lanes, strict=True))
    more = 8 * (len(data) - len(rest[2 * lanes[-1] :])) - 32 * lanes[-1] - bits
    assert -16 * lanes[-1] - 0.01 * bits - 1 <= more <= 0.01 * bits + 1


@given(GROUPS, st.binary(max_size=9))
def test_decode_is_the_inverse_of_encode(groups, rest):
    """Of any parts: empty, alphabets of 1 to 2^13, several tables, skewed or not; both ways, in the bits counted."""
    assert_decoded(groups, rest)


@pytest.mark.parametrize(("first", "second"), [(0, 70_000), (70_000, 10), (5000, 400_000), (400_000, 5000)])
def test_lanes_begin_with_a_group(first, second):
    """A group has the lanes of its symbols, and no fewer than the group before; their ends hold what follows."""
    assert_decoded([[part(first, 5, 1, 1, 0)], [part(second, 9, 2, 2, 1), part(7, 3, 1, 0, 2)]], bytes(range(256)) * 9)


@pytest.mark.parametrize("name", MANY_LANES)
def test_many_lanes(name):
    """The same for as many symbols as take several lanes."""
    assert_decoded([MANY_LANES[name]])


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_lanes(symbols, more):
    """More symbols never have fewer lanes, and a lane has at most 2^14 symbols; so bytes bound symbols."""
    lanes = rans.lane_count(symbols)
    assert 1 <= lanes <= rans.lane_count(symbols + more)
    assert symbols < 16384 * (lanes + 1)


def test_tables_are_learned():
    """Skewed symbols take about their entropy, though no table is stored."""
    symbols = part(30_000, 16, 1, 3, 0).symbols
    counts = np.unique(symbols, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum()
    assert sum(rans.code_bits([rans.Part(np.zeros(30_000, int), 1, 16, symbols)])) < 1.01 * entropy


def test_contexts_have_tables_of_their_own():
    """Symbols that their context tells take next to nothing."""
    contexts = np.random.default_rng(0).integers(0, 4, 30_000)
    assert sum(rans.code_bits([rans.Part(contexts, 4, 4, contexts)])) < 0.05 * 2 * 30_000


def test_counts_at_the_start_are_a_forecast():
    """Symbols as the counts have it take fewer bits from the first one on."""
    symbols = part(100, 40, 1, 9, 0).symbols
    start = 1 + np.bincount(symbols, minlength=40)[None] * 10
    told, not_told = (sum(rans.code_bits([rans.Part(symbols * 0, 1, 40, symbols, s)])) for s in (start, None))
    assert told < 0.9 * not_told


@pytest.mark.parametrize("singly", WAYS)
@given(GROUPS, st.data())
def test_damaged_streams(singly, groups, data):
    """Fewer bytes, more bytes or others are an error, or other symbols, never anything else."""
    stream = bytearray(rans.encode(groups))
    change = data.draw(st.sampled_from(["cut", "add", "flip"]))
    if change == "cut":
        del stream[data.draw(st.integers(0, len(stream) - 1)) :]
    elif change == "add":
        stream += data.draw(st.binary(min_size=1, max_size=5))
    else:
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    parts = [p for some in groups for p in some]
    try:
        with patch.object(rans, "SINGLY", singly):
            found, after = decoded(bytes(stream), groups)
    except rans.DamagedStreamError:
        return
    assert change != "cut"
    if change == "add":
        assert after.endswith(stream[len(rans.encode(groups)) :])
        assert [s.tolist() for s in found] == [p.symbols.tolist() for p in parts]
    assert [len(s) for s in found] == [len(p.contexts) for p in parts]
    assert all((s < p.alphabet).all() for s, p in zip(found, parts, strict=True))
