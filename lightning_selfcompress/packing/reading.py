"""Reading of packed files, with checks of every field."""

import math
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import rans, varint
from lightning_selfcompress.packing.bounds import LARGEST_BOUND, WITHIN, put_bounds, to_tokens
from lightning_selfcompress.packing.content import DTYPES, EXPONENT_LIMIT, Codes, Packed, PackedTensor
from lightning_selfcompress.packing.structure import (
    CODED,
    HALF,
    INT32,
    LEAVES,
    LONGEST_NAME,
    MAGIC,
    MOST_CLASSES,
    MOST_DIMS,
    MOST_ENTRIES,
    NARROW,
    PARTS,
    VERSION,
    WIDER,
    Alphabets,
    Integers,
    channel_parts,
    entries,
    path_and_leaf,
    weight_part,
)
from lightning_selfcompress.packing.tokens import TOKENS, extra_nbytes, join_tokens
from lightning_selfcompress.quantize.layers import ChannelAxis


def from_file(path: str | os.PathLike[str]) -> Packed:
    """Reads a packed file.

    Args:
        path: Path of the file.

    Returns:
        The stored content.

    Raises:
        PackedFileError: If the file is damaged, is of another format version, or is not a packed file.
        OSError: If the file cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:  # reads only the first bytes if the file is of another kind
            start = file.read(len(MAGIC))
            return from_bytes(start + file.read() if start == MAGIC else start)
    except PackedFileError as error:
        raise PackedFileError(f"{os.fspath(path)}: {error}") from error


def from_bytes(data: bytes) -> Packed:
    """Reads the bytes that :func:`~lightning_selfcompress.packing.to_bytes` wrote.

    Args:
        data: The bytes of a whole file.

    Returns:
        The stored content.

    Raises:
        PackedFileError: If the bytes are not a packed file of this version, or the content does not fit the memory.
    """
    try:
        return _read(data)
    except rans.DamagedStreamError as error:
        raise PackedFileError(f"Expected entropy-coded weights: {error} {_ADVICE}") from error
    except MemoryError as error:
        raise PackedFileError("Expected a network that fits the memory, got one of more weights than that.") from error


_ADVICE = "The file is damaged; take another copy."


def _read(data: bytes) -> Packed:
    reader = _Reader(data)
    heads, attributes = reader.head()
    coded = [head for head in heads if head.axis is not None]
    lengths = reader.number(), reader.number()
    of_channels, of_weights = (reader.take(n) for n in lengths)
    rans.check_length(of_channels, rans.lane_count(PARTS * sum(head.channels for head in coded)))
    found = rans.decode(of_channels, [p for head in coded for p in channel_parts(head.alphabets, head.channels)])
    classes, bounds = found[::PARTS], found[2::PARTS]
    relative = (exponents.astype(np.int16) for exponents in found[1::PARTS])
    exponents = [e + np.int16(head.first_exponent) for e, head in zip(relative, coded, strict=True)]

    counts = [int(np.count_nonzero(c)) * head.row for c, head in zip(classes, coded, strict=True)]
    rans.check_length(of_weights, rans.lane_count(sum(counts)))
    parts = [weight_part(head.alphabets, c, head.row) for head, c in zip(coded, classes, strict=True)]
    symbols = rans.decode(of_weights, parts)
    known = {
        head.name: _coded(head, c, e, _codes(s.reshape(head.row, np.count_nonzero(c)), b[c > 0], reader))
        for head, c, e, b, s in zip(coded, classes, exponents, bounds, symbols, strict=True)
    }
    tensors = tuple(
        known[h.name]
        if h.axis is not None
        else PackedTensor(h.name, h.dtype, h.shape, reader.values(h), half=h.storage == HALF)
        for h in heads
    )
    reader.end()
    return Packed(tensors, attributes)


def _codes(symbols: Integers, bounds: Integers, reader: "_Reader") -> Integers:
    """Returns the codes of symbols, ``(channels, weights per channel)``; takes their extra bits from the reader."""
    tokens = to_tokens(symbols, bounds)
    if int(tokens.max(initial=0)) >= TOKENS:
        raise PackedFileError(f"Expected tokens below {TOKENS}. {_ADVICE}")
    codes = join_tokens(tokens.reshape(-1), reader.take(extra_nbytes(tokens)))
    return np.ascontiguousarray(put_bounds(codes.reshape(symbols.shape), symbols, bounds).T)


def _coded(head: "_Head", classes: Integers, exponents: Integers, codes: Integers) -> PackedTensor:
    """Makes a coded tensor. A channel of a class other than 0 whose codes are all 0 is treated as one of class 0."""
    alive, living = classes > 0, codes.any(1)
    if not living.all():
        alive[alive], codes = living, codes[living]
    assert head.axis is not None
    return PackedTensor(head.name, head.dtype, head.shape, codes=Codes(head.axis, alive, codes, exponents))


_NONE = Alphabets()


@dataclass(frozen=True)
class _Head:
    """The description of one tensor in the head of a file."""

    name: str
    dtype: torch.dtype
    storage: int
    shape: tuple[int, ...]
    axis: ChannelAxis | None = None
    alphabets: Alphabets = _NONE
    first_exponent: int = 0

    @property
    def channels(self) -> int:
        """The number of output channels of a coded tensor; 0 for any other tensor."""
        return self.shape[self.axis.dim] * self.axis.groups if self.axis is not None else 0

    @property
    def row(self) -> int:
        """The number of weights of each channel of a coded tensor; 0 for any other tensor."""
        if self.axis is None:
            return 0
        return math.prod(n for d, n in enumerate(self.shape) if d != self.axis.dim) // self.axis.groups


class _Reader:
    """Reads the fields of a file in order, and never beyond the end of the file."""

    def __init__(self, data: bytes) -> None:
        if data[: len(MAGIC)] != MAGIC:
            raise PackedFileError(f"Expected a packed file, which begins with {MAGIC!r}, got {data[:4]!r}.")
        if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
            raise PackedFileError(
                f"Expected version {VERSION} of the format, got {data[len(MAGIC)]}. Open it with the version of "
                f"lightning-selfcompress that wrote it, or a later one."
            )
        if len(data) < 9 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise PackedFileError(f"Expected a checksum that fits the content. {_ADVICE}")
        self._data, self._at = memoryview(data)[:-4], len(MAGIC) + 1

    def take(self, count: int) -> bytes:
        """Reads the next ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise PackedFileError(f"Expected {count} bytes more, got {len(self._data) - self._at}. {_ADVICE}")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def number(self, largest: int = 1 << 40) -> int:
        """Reads the next number, a varint."""
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > largest:
                    break
                return value
        raise PackedFileError(f"Expected a number up to {largest}. {_ADVICE}")

    def name(self, previous: str) -> str:
        """Reads the next name, which shares the first bytes of its path with the previous name."""
        (leaf,) = self.take(1)
        before = path_and_leaf(previous)[0].encode()
        shared = self.number(len(before))
        try:
            path = (before[:shared] + self.take(self.number(LONGEST_NAME - shared))).decode()
        except UnicodeDecodeError as error:
            raise PackedFileError(f"Expected a name in UTF-8. {_ADVICE}") from error
        if leaf >= len(LEAVES):
            raise PackedFileError(f"Expected a known name after {path!r}, got number {leaf}. {_ADVICE}")
        name = f"{path}.{LEAVES[leaf]}" if leaf else path
        if path_and_leaf(name) != (path, leaf):
            raise PackedFileError(f"Expected the last word of {name!r} by its number. {_ADVICE}")
        return name

    def head(self) -> tuple[list[_Head], dict[str, int]]:
        """Reads the heads of all tensors and the attributes, which are integers that do not follow from shapes."""
        heads: list[_Head] = []
        previous = ""
        for _ in range(self.number()):
            heads.append(self._one(self.name(previous)))
            previous = heads[-1].name
        attributes = []
        for _ in range(self.number()):
            previous = self.name(previous)
            attributes.append((previous, self.number()))
        if len({head.name for head in heads}) < len(heads) or len(dict(attributes)) < len(attributes):
            raise PackedFileError(f"Expected every name once. {_ADVICE}")
        return heads, dict(attributes)

    def _one(self, name: str) -> _Head:
        (kind,) = self.take(1)
        storage = kind >> 4
        if kind & 15 >= len(DTYPES) or storage > INT32:
            raise PackedFileError(f"Expected a known type of {name!r}, got {kind}. {_ADVICE}")
        dtype = DTYPES[kind & 15]
        if not dtype.is_floating_point if storage == CODED else dtype not in WIDER.get(storage, DTYPES):
            raise PackedFileError(f"Expected {name!r} stored in a narrower type than {dtype}, got {kind}. {_ADVICE}")
        shape = tuple(self.number() for _ in range(self.number(MOST_DIMS)))
        if entries(shape) > MOST_ENTRIES:
            raise PackedFileError(f"Expected a shape of {name!r} of at most 2^40 entries, got {shape}. {_ADVICE}")
        if storage != CODED:
            return _Head(name, dtype, storage, shape)
        if 0 in shape:
            raise PackedFileError(f"Expected entries in {name!r}, which has codes, got {shape}. {_ADVICE}")
        axis = ChannelAxis(self.number(), self.number())
        largest = MOST_CLASSES, 2 * EXPONENT_LIMIT, LARGEST_BOUND + 1, TOKENS + WITHIN
        alphabets = Alphabets(*map(self.number, largest))
        first = varint.from_zigzag(self.number())
        if axis.dim >= len(shape) or axis.groups < 1 or (axis.groups > 1 and (axis.dim == 0 or shape[0] % axis.groups)):
            raise PackedFileError(f"Expected channels of {name!r} {shape}, got {axis}. {_ADVICE}")
        if min(alphabets) < 1 or not -EXPONENT_LIMIT <= first <= EXPONENT_LIMIT - alphabets.exponents:
            raise PackedFileError(
                f"Expected exponents of {name!r} from {-EXPONENT_LIMIT} to {EXPONENT_LIMIT - 1}, got {first} and "
                f"{alphabets}. {_ADVICE}"
            )
        return _Head(name, dtype, storage, shape, axis, alphabets, first)

    def values(self, head: _Head) -> Tensor:
        """Reads the values of a tensor that is not coded."""
        stored = NARROW.get(head.storage, head.dtype)
        count = math.prod(head.shape)
        content = bytearray(self.take(count * stored.itemsize))
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
        if stored == torch.bool:
            return (flat != 0).reshape(head.shape)
        return flat.view(stored).to(head.dtype).reshape(head.shape)

    def end(self) -> None:
        """Checks that the whole file has been read.

        Raises:
            PackedFileError: If bytes are left.
        """
        if self._at != len(self._data):
            raise PackedFileError(f"Expected the end of the file, found {len(self._data) - self._at} bytes. {_ADVICE}")
