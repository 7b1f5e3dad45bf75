"""Packed files that claim what cannot be: refused before room is made for it, with a checksum that fits."""

import tracemalloc

import numpy as np
import psutil
import pytest
import torch
from packed_networks import read_or_refuse, sealed

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import from_bytes, packed_size, rans, to_bytes, varint
from lightning_selfcompress.packing.levels import Classes
from lightning_selfcompress.packing.structure import LEAVES

FLOAT32, INT32, COMPLEX = 0, 7, 10
HALF, CODED, INT32_STORED, SCALED, LOGARITHMIC, SAME = (storage << 4 for storage in (1, 2, 5, 6, 7, 8))


def numbers(*values):
    return b"".join(map(varint.write, values))


def name(text, dropped=0, leaf=0, form=0):
    text = text if isinstance(text, bytes) else text.encode()
    more = numbers(dropped - 7) if dropped >= 7 else b""
    return bytes([leaf | form << 5]) + numbers(min(dropped, 7) + 8 * len(text)) + more + text


def tensor(kind, shape, *coded, called=None):
    """The head of a tensor in the form for any tensor."""
    return (called or name("x")) + bytes([kind]) + numbers(len(shape), *shape) + b"".join(coded)


def alphabets(first_level=0, levels=0, exponents=1, first=-64, symbols=1, share=0, shares=0, bounds=1, flag=None):
    """The alphabets of a coded tensor that is the first one of its file."""
    flag = shares > 0 if flag is None else flag
    content = numbers(flag + 2 * (first_level + 79 * levels), exponents, varint.zigzag(first + 64), symbols)
    return content + (numbers(share + 15 * shares, bounds) if flag else b"")


def coded(shape, dim=0, groups=1, called=None, kind=CODED, **more):
    """The head of a coded tensor in the form for any tensor."""
    return tensor(kind, shape, numbers(dim, groups), alphabets(**more), called=called)


def plain_coded(flags, *sizes, form=1, leaf=1):
    """The head of a coded float32 tensor in the form for that."""
    return name("x", form=form, leaf=leaf) + numbers(flags, *sizes) + alphabets()


IDLE = (1 << 16).to_bytes(4, "little")  # the state of a lane that has nothing to decode


def crafted(*heads, attributes=(), stream=b"", count=None):
    """A file that claims what you like, with a checksum that fits."""
    count = len(heads) if count is None else count
    parts = [b"SCNN\1", numbers(2 * count + bool(attributes)), *heads]
    parts += [numbers(len(attributes)), *attributes] if attributes else []
    return sealed(b"".join([*parts, stream]))


def test_crafted_files_can_be_whole():
    """The files of the next tests fail for what they claim, not for how they are made."""
    packed = from_bytes(
        crafted(
            tensor(FLOAT32, (2,), called=name("a")),
            coded((2, 3), called=name("b", dropped=1)),
            plain_coded(2 + 32, 2, form=7),  # 2 channels, and as many inputs as the tensor before has channels
            name("y", dropped=2, form=6),
            attributes=[name("c") + numbers(5)],
            stream=(1 << 16 | 0x803F).to_bytes(4, "little") + bytes(6) + b"\2\1\xff" + bytes(4),
            count=5,
        )
    )
    shapes = {"a": (2,), "b": (2, 3), "bx.weight": (2, 2), "bx.bias": (2,), "y": (2,)}
    assert {t.name: t.shape for t in packed.tensors} == shapes
    assert packed.attributes == {"yc": 5}
    a, b, *_, bias, y = (t.tensor() for t in packed.tensors)
    assert b.equal(torch.zeros(2, 3))
    assert a[0] == torch.tensor([0x3F, 0x80, 0, 0], dtype=torch.uint8).view(torch.float32)
    assert a[1] == y[0] == y[1] == 0
    assert bias.tolist() == [2.0, -2.0]


HUGE = 1 << 40
CLAIMS = {
    "a huge shape": tensor(FLOAT32, (HUGE,)),
    "a product beyond 2^63": tensor(FLOAT32, (HUGE, HUGE)),
    "a product beyond 2^63 with a 0": tensor(FLOAT32, (HUGE, 0, HUGE)),
    "a size beyond 2^40": tensor(FLOAT32, (HUGE + 1, 0)),
    "a huge shape of bytes": tensor(FLOAT32 | SCALED, (HUGE,), b"\0"),
    "a huge shape of one value": tensor(FLOAT32 | SAME, (HUGE, 2)),
    "one value of nothing": tensor(FLOAT32 | SAME, (3, 0)),
    "one value of no channels": name("x", form=6),
    "a huge coded shape": coded((1 << 20, 1 << 20), levels=1, symbols=15),
    "many channels": coded((HUGE,)),
    "many channels without weights": coded((HUGE, 0)),
    "some channels without weights": coded((3, 0)),
    "no channels": coded((0, 3)),
    "many dimensions": tensor(FLOAT32, (0,) * 17),
    "very many dimensions": name("x") + bytes([0]) + numbers(HUGE),
    "no dimension for channels": coded(()),
    "channels in a dimension that is not there": coded((2, 3), dim=2),
    "channels in a dimension far away": coded((2, 3), dim=HUGE),
    "no groups": coded((4, 3), dim=1, groups=0),
    "groups that do not divide": coded((4, 3), dim=1, groups=3),
    "groups of dimension 0": coded((4, 3), dim=0, groups=2),
    "huge groups of nothing": coded((0, 3), dim=1, groups=HUGE),
    "many levels": coded((2, 3), levels=80),
    "levels too high": coded((2, 3), first_level=78, levels=2),
    "no shares": coded((2, 3), shares=0, flag=1),
    "many shares": coded((2, 3), shares=16),
    "shares too high": coded((2, 3), share=14, shares=2),
    "no exponents": coded((2, 3), exponents=0),
    "many exponents": coded((2, 3), exponents=4097),
    "exponents too large": coded((2, 3), exponents=2, first=2047),
    "exponents too small": coded((2, 3), first=-2049),
    "exponents far away": coded((2, 3), first=HUGE),
    "no symbols": coded((2, 3), symbols=0),
    "no bounds": coded((2, 3), shares=1, bounds=0),
    "many bounds": coded((2, 3), shares=1, bounds=4097),
    "many symbols": coded((2, 3), symbols=74),
    "plain codes of no dimension": plain_coded(0),
    "plain codes of 17 dimensions": plain_coded(17, *[1] * 17),
    "plain codes of a size before in one dimension": plain_coded(1 + 32, 2),
    "plain codes of no size before": plain_coded(2 + 32, 2),
    "plain codes of a square in two dimensions": plain_coded(2 + 64, 2, 2),
    "plain codes of other flags": plain_coded(2 + 128, 2, 2),
    "huge plain codes": plain_coded(3 + 64, 2, HUGE),
    "plain codes of nothing": plain_coded(2, 0, 2),
    "a bias of a bias": plain_coded(2, 1, 1, form=7, leaf=2),
    "a type that is not there": tensor(12, (0,)),
    "a storage that is not there": tensor(9 << 4, (0,)),
    "codes of whole numbers": coded((2, 3), kind=INT32 | CODED),
    "codes of complex numbers": coded((2, 3), kind=COMPLEX | CODED),
    "whole numbers as float16": tensor(INT32 | HALF, (0,)),
    "whole numbers stored no narrower": tensor(INT32 | INT32_STORED, (0,)),
    "scaled whole numbers": tensor(INT32 | SCALED, (0,), b"\0"),
    "steps of whole numbers": tensor(INT32 | LOGARITHMIC, (0,), b"\0"),
    "a name that is no UTF-8": tensor(0, (0,), called=name(b"\xff\xfe")),
    "a name of half a character": tensor(0, (0,), called=name("ö".encode()[:1])),
    "less of the name before than it has": tensor(0, (0,), called=name("x", dropped=1)),
    "far less of the name before": tensor(0, (0,), called=name("x", dropped=7)),
    "a name beyond the file": bytes([0]) + numbers(8 * 1000) + b"x",
    "a very long name": tensor(0, (0,), called=name("x" * 1025)),
    "a huge name": bytes([0]) + numbers(HUGE) + b"x",
    "a last word that is not there": tensor(0, (0,), called=name("x", leaf=len(LEAVES))),
    "a last word that is written out": tensor(0, (0,), called=name("x.weight")),
    "a number without end": b"\0" + b"\x80" * 30,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_be(claim):
    """It is refused before room is made for it."""
    data = crafted(CLAIMS[claim], stream=IDLE)
    tracemalloc.start()
    with pytest.raises(PackedFileError):
        from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 17


VALUES = {
    "integers below -127": tensor(FLOAT32 | SCALED, (2,)) + numbers(0) + b"\x7f\x80",
    "a scale too small": tensor(FLOAT32 | SCALED, (2,)) + numbers(varint.zigzag(-156)) + b"\1\2",
    "a scale too large": tensor(FLOAT32 | SCALED, (2,)) + numbers(varint.zigzag(122)) + b"\1\2",
    "a step too small": tensor(FLOAT32 | LOGARITHMIC, (2,)) + numbers(varint.zigzag(-2049)) + b"\1\2",
    "a step too large": tensor(FLOAT32 | LOGARITHMIC, (2,)) + numbers(varint.zigzag(2000)) + b"\1\x30",
}


@pytest.mark.parametrize("claim", VALUES)
def test_values_that_cannot_be(claim):
    """Numbers beyond those that a storage has are refused."""
    with pytest.raises(PackedFileError, match=r"Expected (integers|exponents|a number)"):
        from_bytes(crafted(VALUES[claim], count=1))


def test_one_value_takes_no_memory():
    """A tensor may be of 2^40 entries of one value; they are not made before anybody asks for them."""
    data = crafted(tensor(FLOAT32 | SAME, (1 << 20, 1 << 20)), stream=bytes(4))
    tracemalloc.start()
    before = psutil.Process().memory_info().rss
    packed = from_bytes(data)
    assert to_bytes(packed) == data
    assert packed_size(packed).nbytes == len(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert psutil.Process().memory_info().rss < before + (1 << 25)
    tracemalloc.stop()


COUNTS = {
    "huge number of tensors": crafted(count=HUGE),
    "too many tensors": crafted(tensor(0, ()), count=2),
    "too few tensors": crafted(plain_coded(2, 1, 1, form=7), count=1, stream=IDLE + bytes(2)),
    "a name twice": crafted(tensor(0, ()), tensor(0, (), called=bytes([16])), stream=bytes(8)),
    "an attribute twice": crafted(attributes=[name("a") + numbers(1), bytes([16]) + numbers(2)]),
    "an attribute with the form of a tensor": crafted(attributes=[name("a", form=2) + numbers(1)]),
    "no stream": crafted(coded((2, 3))),
    "half a state": crafted(coded((2, 3)), stream=IDLE[:2]),
    "half a word": crafted(coded((2, 3)), stream=IDLE + b"\0"),
    "words left over": crafted(coded((2, 3)), stream=IDLE + bytes(2)),
    "bytes in a lane that nothing needs": crafted(coded((2, 3)), stream=b"\1" + IDLE[1:]),
    "a lane that does not end where it began": crafted(coded((2, 3)), stream=bytes(4)),
}


@pytest.mark.parametrize("claim", COUNTS)
def test_counts_that_cannot_be(claim):
    """Numbers of tensors, of bytes and of words that do not fit are refused."""
    with pytest.raises(PackedFileError):
        from_bytes(COUNTS[claim])


def test_names_cannot_grow_without_end():
    """Thousands of names that each begin with all of the one before: refused, in little memory."""
    heads = [tensor(0, (0,), called=name("x")) for _ in range(5000)]
    tracemalloc.start()
    with pytest.raises(PackedFileError):
        from_bytes(crafted(*heads))
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def coded_file(alive, row, symbols, alphabet=73, bound=0, rest=b""):
    """A file with one coded tensor of so many living channels of one level, or of one share if they have a bound."""
    n, shares = len(alive), int(bound > 0)
    living = np.zeros(sum(alive), np.uint8)
    Classes(0, 1 - shares, 0, shares).start_counts(alphabet)
    groups = [
        [rans.Part(np.zeros(n, np.uint8), 1, 2, np.array(alive))],
        [rans.Part(living, 1, 1, living), rans.Part(living, 1, bound + 1, np.full(len(living), bound))],
        [
            rans.Part(
                np.tile(living, row), 1, alphabet, symbols, Classes(0, 1 - shares, 0, shares).start_counts(alphabet)
            )
        ],
    ]
    head = coded((n, row), levels=1 - shares, symbols=alphabet, shares=shares, bounds=bound + 1)
    return crafted(head, stream=rans.encode(groups, rest))


def test_weights_that_are_not_there():
    """A living channel of more weights than the stream has lanes for is refused before room is made for them."""
    channel = rans.Part(np.zeros(1, np.uint8), 1, 2, np.array([1]))
    head = coded((1, 1 << 27), levels=1, symbols=71)
    tracemalloc.start()
    with pytest.raises(PackedFileError, match="more states, got 0 words"):
        from_bytes(crafted(head, stream=rans.encode([[channel]])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_extra_bits_that_are_not_there():
    """Large codes whose lower bits are beyond the end are refused in little memory."""
    data = coded_file([1] * 100, 1000, np.full(100_000, 70))
    tracemalloc.start()
    with pytest.raises(PackedFileError, match="bytes more"):
        from_bytes(data)
    assert tracemalloc.get_traced_memory()[1] < 40 * 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(("symbol", "token", "bound"), [(1, 0, 4095), (22, 20, 3)])
def test_bounds(symbol, token, bound):
    """A bound has symbols of its own, whatever else the channel holds."""
    extra = b"" if token < 15 else bytes(-(-100 * ((token - 15) // 2 + 3) // 8))
    packed = from_bytes(coded_file([1, 1], 50, np.full(100, symbol), bound=bound, rest=extra))
    assert (packed.tensors[0].codes.rows == (bound - 1 if symbol == 1 else -32)).all()


@pytest.mark.parametrize("symbol", [71, 72])
def test_tokens_that_are_not_there(symbol):
    """Channels without a bound have no symbols beyond those of tokens."""
    with pytest.raises(PackedFileError, match="Expected tokens below 71"):
        from_bytes(coded_file([1, 1], 50, np.full(100, symbol), rest=bytes(1000)))


@pytest.mark.parametrize("channels", [1000, 1_000_000])
@pytest.mark.parametrize("bound", [0, 1, 4095])
@pytest.mark.parametrize("token", [0, 14, 20, 70])
def test_memory_is_bounded_by_the_weights(token, bound, channels):
    """Reading takes less than ten times the float weights that a file claims, however few bytes or bits they take."""
    symbol, row = token + 2 if bound else token, 1_000_000 // channels
    extra = b"" if token < 15 else bytes(-(-1_000_000 * ((token - 15) // 2 + 3) // 8))
    data = coded_file([1] * channels, row, np.full(1_000_000, symbol), bound=bound, rest=extra)
    tracemalloc.start()
    packed = from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.tensors[0].codes.living.shape in ((channels, row), (0, row))
    assert peak < 10 * 4 * 1_000_000


def test_channels_without_codes_take_no_memory():
    """A channel of class 0 may have 2^32 weights; they are not made before anybody asks for them."""
    data = crafted(coded((2, 1 << 32)), stream=IDLE)
    before = psutil.Process().memory_info().rss
    packed = read_or_refuse(data)  # refused where memory is not overcommitted
    assert psutil.Process().memory_info().rss < before + (1 << 25)
    assert packed is None or packed.tensors[0].codes.living.shape == (0, 1 << 32)
    assert packed is None or packed_size(packed).nbytes == len(to_bytes(packed)) < len(data)
    assert psutil.Process().memory_info().rss < before + (1 << 25)
