"""Damaged packed files: always our own error, soon and in little memory, whatever is claimed."""

import random

import pytest
import torch
from packed_networks import Buffers, clipped, read_or_refuse, sealed, tied, with_random_codes
from torch import nn

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import Packed, from_bytes, packed_size, to_bytes
from lightning_selfcompress.packing.bounds import bounds_of


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
    head = packed_size(from_bytes(data)).structure_nbytes - 4
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
