"""Damaged packed files: always our own error, soon and in little memory, whatever is claimed."""

import random
import time
import tracemalloc
import zlib

import numpy as np
import psutil
import pytest
import torch
from packed_networks import Buffers, clipped, tied, with_random_codes
from torch import nn

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import Packed, from_bytes, packed_size, rans, to_bytes, varint
from lightning_selfcompress.packing.bounds import bounds_of
from lightning_selfcompress.packing.structure import LEAVES


@pytest.fixture(scope="module")
def data():
    """A file of a few hundred bytes that has something of everything."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(2, 3, 2),
        "norm": nn.BatchNorm2d(3),
        "up": nn.ConvTranspose1d(4, 6, 2, groups=2),
        "lin": nn.Linear(24, 4, bias=False),
        "größe": nn.Embedding(4, 3),
    }
    model = with_random_codes(nn.ModuleDict(layers))
    with torch.no_grad():
        model["lin"].bit_depth.copy_(torch.tensor([0, 3, 20, 0]))
        model["lin"].exponent.fill_(-18)
    model.register_buffer("mask", torch.tensor([True, False]))
    packed = Packed.of(model)
    assert any(bounds_of(t.codes.rows).any() for t in packed.coded)
    return to_bytes(packed)


def sealed(content):
    """A file of this content, with the checksum that belongs to it."""
    return content + zlib.crc32(content).to_bytes(4, "little")


def read_or_refuse(data):
    """What is read, or None where the file is refused; it takes no longer than some seconds."""
    start = time.perf_counter()
    try:
        return from_bytes(data)
    except PackedFileError:
        return None
    finally:
        assert time.perf_counter() - start < 5


def assert_refused_or_whole(data, *, again=False):
    """Refused, or a network that can be used, and with ``again`` written to a file that holds the same."""
    packed = read_or_refuse(data)
    if packed is not None:
        for tensor in packed.tensors:
            if torch.Size(tensor.shape).numel() < 1 << 20:
                assert tensor.tensor().shape == tensor.shape
                assert tensor.tensor().dtype == tensor.dtype
        if again and sum(torch.Size(tensor.shape).numel() for tensor in packed.tensors) < 1 << 20:
            written = to_bytes(packed)
            assert to_bytes(from_bytes(written)) == written
    return packed is None


def test_every_byte_flipped(data):
    """One bit or all bits of one byte: refused."""
    for at in range(len(data)):
        for flip in (*(1 << bit for bit in range(8)), 0xFF):
            assert read_or_refuse(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]) is None


def test_truncated_at_every_length(data):
    """A part of a file, with its own checksum or without: refused."""
    for length in range(len(data)):
        assert read_or_refuse(data[:length]) is None
        if length < len(data) - 4:
            assert read_or_refuse(sealed(data[:length])) is None


def test_bytes_appended(data):
    """More than a file, with its own checksum or without: refused."""
    for more in (b"\0", b"\xff", b"\0" * 4, b"\0\0", data, data[-4:]):
        assert read_or_refuse(data + more) is None
        assert read_or_refuse(sealed(data[:-4] + more)) is None


def mutated(content, choose):
    """Some bytes changed, taken out, put in or doubled."""
    content = bytearray(content)
    for _ in range(choose.choice([1, 1, 1, 2, 3, 8])):
        at = choose.randrange(len(content))
        kind = choose.randrange(6)
        if kind < 3:
            content[at] = choose.choice([0, 1, 2, 0x7F, 0x80, 0xFF, choose.randrange(256), content[at] ^ 1])
        elif kind == 3:
            del content[at : at + choose.choice([1, 1, 2, 5])]
        elif kind == 4:
            content[at:at] = choose.randbytes(choose.choice([1, 1, 2, 5]))
        else:
            content[at:at] = content[at : at + choose.randrange(1, 20)]
    return bytes(content)


def test_random_mutations(data):
    """10,000 files with random changes: refused unless nothing changed."""
    choose = random.Random(0)
    for _ in range(10_000):
        other = mutated(data, choose)
        assert other == data or read_or_refuse(other) is None


def attack(data, count, seed):
    """The number of refused files among ``count`` whose structure was changed, which the checksum does not tell."""
    choose = random.Random(seed)
    head = data.rindex(b"conv") + 10
    refused = 0
    for i in range(count):
        content = data[:-4]
        if i % 2:  # the structure alone, which is a fraction of the bytes
            content = data[:5] + mutated(data[5:head], choose) + data[head:-4]
        else:
            content = data[:5] + mutated(data[5:-4], choose)
        refused += assert_refused_or_whole(sealed(content), again=i % 8 < 2)
    return refused


def test_random_mutations_with_a_checksum_that_fits(data):
    """10,000 files that only their content gives away: refused, or another network that is whole."""
    assert 5_000 < attack(data, 10_000, seed=1) < 10_000


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_more_mutations_with_a_checksum_that_fits(data, seed):
    """The same for 200,000 more."""
    assert attack(data, 20_000, seed) > 10_000


FLOAT32, INT32, COMPLEX = 0, 7, 10
HALF, CODED, INT32_STORED = 1 << 4, 2 << 4, 5 << 4


def numbers(*values):
    return b"".join(map(varint.write, values))


def name(text, shared=0, leaf=0):
    text = text if isinstance(text, bytes) else text.encode()
    return bytes([leaf]) + numbers(shared, len(text)) + text


def tensor(kind, shape, *coded, called=None):
    """The head of a tensor."""
    return (called or name("x")) + bytes([kind]) + numbers(len(shape), *shape, *coded)


def crafted(*heads, attributes=(), channels=bytes(4), tokens=bytes(4), rest=b"", count=None):
    """A file that claims what you like, with a checksum that fits."""
    parts = [b"SCNN\1", numbers(len(heads) if count is None else count), *heads, numbers(len(attributes)), *attributes]
    return sealed(b"".join([*parts, numbers(len(channels), len(tokens)), channels, tokens, rest]))


IDLE = (1 << 16).to_bytes(4, "little")  # the state of a lane that has nothing to decode


def test_crafted_files_can_be_whole():
    """The files of the next tests fail for what they claim, not for how they are made."""
    packed = from_bytes(
        crafted(
            tensor(FLOAT32, (2,), called=name("a")),
            tensor(FLOAT32 | CODED, (2, 3), 0, 1, 1, 1, 1, 1, 0, called=name("b")),
            attributes=[name("c") + numbers(5)],
            channels=IDLE,
            tokens=IDLE,
            rest=bytes(8),
        )
    )
    assert [(t.name, t.shape) for t in packed.tensors] == [("a", (2,)), ("b", (2, 3))]
    assert packed.attributes == {"c": 5}
    assert packed.tensors[1].tensor().equal(torch.zeros(2, 3))


HUGE = 1 << 40
CLAIMS = {
    "a huge shape": tensor(FLOAT32, (HUGE,)),
    "a product beyond 2^63": tensor(FLOAT32, (HUGE, HUGE)),
    "a product beyond 2^63 with a 0": tensor(FLOAT32, (HUGE, 0, HUGE)),
    "a size beyond 2^40": tensor(FLOAT32, (HUGE + 1, 0)),
    "a huge coded shape": tensor(CODED, (1 << 20, 1 << 20), 0, 1, 2, 1, 1, 15, 0),
    "many channels": tensor(CODED, (HUGE,), 0, 1, 1, 1, 1, 1, 0),
    "many channels without weights": tensor(CODED, (HUGE, 0), 0, 1, 1, 1, 1, 1, 0),
    "some channels without weights": tensor(CODED, (3, 0), 0, 1, 1, 1, 1, 1, 0),
    "no channels": tensor(CODED, (0, 3), 0, 1, 1, 1, 1, 1, 0),
    "many dimensions": tensor(FLOAT32, (0,) * 17),
    "very many dimensions": name("x") + bytes([0]) + numbers(HUGE),
    "no dimension for channels": tensor(CODED, (), 0, 1, 1, 1, 1, 1, 0),
    "channels in a dimension that is not there": tensor(CODED, (2, 3), 2, 1, 1, 1, 1, 1, 0),
    "channels in a dimension far away": tensor(CODED, (2, 3), HUGE, 1, 1, 1, 1, 1, 0),
    "no groups": tensor(CODED, (4, 3), 1, 0, 1, 1, 1, 1, 0),
    "groups that do not divide": tensor(CODED, (4, 3), 1, 3, 1, 1, 1, 1, 0),
    "groups of dimension 0": tensor(CODED, (4, 3), 0, 2, 1, 1, 1, 1, 0),
    "huge groups of nothing": tensor(CODED, (0, 3), 1, HUGE, 1, 1, 1, 1, 0),
    "no classes": tensor(CODED, (2, 3), 0, 1, 0, 1, 1, 1, 0),
    "many classes": tensor(CODED, (2, 3), 0, 1, 65, 1, 1, 1, 0),
    "no exponents": tensor(CODED, (2, 3), 0, 1, 1, 0, 1, 1, 0),
    "many exponents": tensor(CODED, (2, 3), 0, 1, 1, 4097, 1, 1, 0),
    "exponents too large": tensor(CODED, (2, 3), 0, 1, 1, 2, 1, 1, varint.zigzag(2047)),
    "exponents too small": tensor(CODED, (2, 3), 0, 1, 1, 1, 1, 1, varint.zigzag(-2049)),
    "no symbols": tensor(CODED, (2, 3), 0, 1, 1, 1, 1, 0, 0),
    "no bounds": tensor(CODED, (2, 3), 0, 1, 1, 1, 0, 1, 0),
    "many bounds": tensor(CODED, (2, 3), 0, 1, 1, 1, 4097, 1, 0),
    "many symbols": tensor(CODED, (2, 3), 0, 1, 1, 1, 1, 74, 0),
    "a type that is not there": tensor(12, (0,)),
    "a storage that is not there": tensor(6 << 4, (0,)),
    "codes of whole numbers": tensor(INT32 | CODED, (2, 3), 0, 1, 1, 1, 1, 1, 0),
    "codes of complex numbers": tensor(COMPLEX | CODED, (2, 3), 0, 1, 1, 1, 1, 1, 0),
    "whole numbers as float16": tensor(INT32 | HALF, (0,)),
    "whole numbers stored no narrower": tensor(INT32 | INT32_STORED, (0,)),
    "a name that is no UTF-8": tensor(0, (0,), called=name(b"\xff\xfe")),
    "a name of half a character": tensor(0, (0,), called=name("ö".encode()[:1])),
    "more of the name before than it has": tensor(0, (0,), called=name("x", shared=1)),
    "a name beyond the file": bytes([0]) + numbers(0, 1000) + b"x",
    "a very long name": tensor(0, (0,), called=name("x" * 1025)),
    "a huge name": bytes([0]) + numbers(0, HUGE) + b"x",
    "a last word that is not there": tensor(0, (0,), called=name("x", leaf=len(LEAVES))),
    "a last word that is written out": tensor(0, (0,), called=name("x.weight")),
    "a number without end": b"\0" + b"\x80" * 30,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_be(claim):
    """It is refused before room is made for it."""
    data = crafted(CLAIMS[claim], channels=IDLE, tokens=IDLE)
    tracemalloc.start()
    with pytest.raises(PackedFileError):
        from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 17


COUNTS = {
    "huge number of tensors": crafted(count=HUGE),
    "too many tensors": crafted(tensor(0, ()), count=2),
    "a name twice": crafted(tensor(0, ()), tensor(0, ()), channels=IDLE, tokens=IDLE, rest=bytes(8)),
    "an attribute twice": crafted(
        attributes=[name("a") + numbers(1), name("a") + numbers(2)], channels=IDLE, tokens=IDLE
    ),
    "streams beyond the end": sealed(b"SCNN\1" + numbers(0, 0, HUGE, HUGE)),
    "streams without states": crafted(channels=b"", tokens=b""),
    "half a word": crafted(channels=IDLE + b"\0", tokens=IDLE),
    "words left over": crafted(channels=IDLE + b"\0\0", tokens=IDLE),
    "a lane that does not end where it began": crafted(channels=bytes(4), tokens=IDLE),
}


@pytest.mark.parametrize("claim", COUNTS)
def test_counts_that_cannot_be(claim):
    """Numbers of tensors, of bytes and of words that do not fit are refused."""
    with pytest.raises(PackedFileError):
        from_bytes(COUNTS[claim])


def test_names_cannot_grow_without_end():
    """Thousands of names that each begin with all of the one before: refused, in little memory."""
    heads = [tensor(0, (0,), called=name("x", shared=min(i, 1024))) for i in range(5000)]
    tracemalloc.start()
    with pytest.raises(PackedFileError):
        from_bytes(crafted(*heads, channels=IDLE, tokens=IDLE))
    assert tracemalloc.get_traced_memory()[1] < 1 << 23


def coded_file(classes, row, symbols, alphabet=73, groups=1, shape=None, bound=0):
    """A file with one coded tensor of these classes and of as many symbols as its living channels have weights."""
    n = len(classes)
    zeros = np.zeros(n, np.uint8)
    parts = [rans.Part(zeros, 1, max(classes) + 1, np.array(classes)), rans.Part(zeros, 1, 1, zeros)]
    parts.append(rans.Part(zeros, 1, bound + 1, np.full(n, bound)))
    contexts = np.tile(np.array([c - 1 for c in classes if c]), row)
    coded = rans.Part(contexts, max(max(classes), 1), alphabet, symbols)
    head = tensor(CODED, shape or (n, row), 0, groups, max(classes) + 1, 1, bound + 1, alphabet, 0)
    return head, rans.encode(parts), rans.encode([coded])


def test_weights_that_are_not_there():
    """A living channel of more weights than the token stream has lanes for is refused before room is made for them."""
    head, channels, _ = coded_file([1], 1, np.zeros(1, int))
    head = tensor(CODED, (1, 1 << 27), 0, 1, 2, 1, 1, 71, 0)
    tracemalloc.start()
    with pytest.raises(PackedFileError, match="an even number, got 4"):
        from_bytes(crafted(head, channels=channels, tokens=IDLE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_extra_bits_that_are_not_there():
    """Large codes whose lower bits are beyond the end are refused in little memory."""
    head, channels, tokens = coded_file([1] * 100, 1000, np.full(100_000, 70))
    tracemalloc.start()
    with pytest.raises(PackedFileError, match="bytes more"):
        from_bytes(crafted(head, channels=channels, tokens=tokens))
    assert tracemalloc.get_traced_memory()[1] < 40 * 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(("symbol", "token", "bound"), [(1, 0, 4095), (22, 20, 3)])
def test_bounds(symbol, token, bound):
    """A bound has symbols of its own, whatever else the channel holds."""
    head, channels, weights = coded_file([1, 1], 50, np.full(100, symbol), bound=bound)
    extra = b"" if token < 15 else bytes(-(-100 * ((token - 15) // 2 + 3) // 8))
    packed = from_bytes(crafted(head, channels=channels, tokens=weights, rest=extra))
    assert (packed.tensors[0].codes.rows == (bound - 1 if symbol == 1 else -32)).all()


@pytest.mark.parametrize("symbol", [71, 72])
def test_tokens_that_are_not_there(symbol):
    """Channels without a bound have no symbols beyond those of tokens."""
    head, channels, weights = coded_file([1, 1], 50, np.full(100, symbol))
    with pytest.raises(PackedFileError, match="Expected tokens below 71"):
        from_bytes(crafted(head, channels=channels, tokens=weights, rest=bytes(1000)))


@pytest.mark.parametrize("channels", [1000, 1_000_000])
@pytest.mark.parametrize("bound", [0, 1, 4095])
@pytest.mark.parametrize("token", [0, 14, 20, 70])
def test_memory_is_bounded_by_the_weights(token, bound, channels):
    """Reading takes less than ten times the float weights that a file claims, however few bytes or bits they take."""
    symbol, row = token + 2 if bound else token, 1_000_000 // channels
    head, streams, tokens = coded_file([1] * channels, row, np.full(1_000_000, symbol), bound=bound)
    extra = b"" if token < 15 else bytes(-(-1_000_000 * ((token - 15) // 2 + 3) // 8))
    data = crafted(head, channels=streams, tokens=tokens, rest=extra)
    tracemalloc.start()
    packed = from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.tensors[0].codes.living.shape in ((channels, row), (0, row))
    assert peak < 10 * 4 * 1_000_000


def test_channels_without_codes_take_no_memory():
    """A channel of class 0 may have 2^32 weights; they are not made before anybody asks for them."""
    head, channels, tokens = coded_file([0, 0], 1 << 32, np.zeros(0, int))
    before = psutil.Process().memory_info().rss
    packed = read_or_refuse(
        crafted(head, channels=channels, tokens=tokens)
    )  # refused where memory is not overcommitted
    assert psutil.Process().memory_info().rss < before + (1 << 25)
    assert packed is None or packed.tensors[0].codes.living.shape == (0, 1 << 32)
    assert packed is None or packed_size(packed).nbytes == len(crafted(head, channels=channels, tokens=tokens))
    assert psutil.Process().memory_info().rss < before + (1 << 25)


def test_another_kind_of_file():
    """It is said that the file is no packed one."""
    for content in (b"", b"PK\3\4" + bytes(100), b"SCN"):
        with pytest.raises(PackedFileError, match="Expected a packed file, which begins with b'SCNN'"):
            from_bytes(content)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version(data, version):
    """It is said which version it is, and what to do, whatever else has changed."""
    for content in (data[5:], b"", b"anything"):
        with pytest.raises(PackedFileError, match=f"Expected version 1 .* got {version}. Open it with"):
            from_bytes(b"SCNN" + bytes([version]) + content)


@pytest.mark.parametrize("make", [Buffers, tied, pytest.param(clipped, marks=pytest.mark.nightly)])
def test_every_byte_flipped_with_a_checksum_that_fits(make):
    """Of networks of other kinds."""
    data = to_bytes(Packed.of(with_random_codes(make())))
    for at in range(5, len(data) - 4):
        for flip in (1, 0xFF):
            assert_refused_or_whole(sealed(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 : -4]))
