"""The bytes of a packed file, and their inverse. ``docs/format.md`` describes them for other readers.

The size of a model is the number of these bytes.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_selfcompress.layers import ChannelAxis
from lightning_selfcompress.packing import rans, varint
from lightning_selfcompress.packing.content import DTYPES, EXPONENT_LIMIT, Packed, PackedTensor
from lightning_selfcompress.packing.tokens import TOKENS, extra_bits, extra_nbytes, join_tokens, tokens_of

MAGIC = b"SCNN"
VERSION = 1
RAW, HALF, CODED, INT8, INT16, INT32 = range(6)  # how a tensor is stored: as it is, in a narrower type, as codes
NARROW = {HALF: torch.float16, INT8: torch.int8, INT16: torch.int16, INT32: torch.int32}
WIDER = {
    HALF: (torch.float32,),
    INT8: (torch.int16, torch.int32, torch.int64),
    INT16: (torch.int32, torch.int64),
    INT32: (torch.int64,),
}
LEAVES = (
    "",  # any other
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "in_proj_weight",
    "in_proj_bias",
    "groups",
)
MOST_CLASSES = 64
MOST_DIMS = 16
MOST_ENTRIES = 1 << 40
LONGEST_NAME = 1 << 10  # bytes, so that names of shared beginnings cannot grow without end

Integers = NDArray[Any]


class PackedFileError(ValueError):
    """A packed file that is damaged, of a later version, or no packed file."""


@dataclass(frozen=True, eq=False)
class _Coded:
    """A coded tensor as it is written.

    Args:
        name: Its name.
        classes: Class of each channel, ``(channels,)``: 0 where all codes are 0; the others have a table each.
        first_exponent: The smallest exponent, in sixteenths.
        exponents: The exponents less the smallest one, ``(channels,)``; 0 in class 0.
        codes: Of the channels that are not in class 0: first weights of all channels, second weights, ...
        tokens: Their tokens.
        row: Weights of a channel.
    """

    name: str
    classes: Integers
    first_exponent: int
    exponents: Integers
    codes: Integers
    tokens: Integers
    row: int

    @classmethod
    def of(cls, tensor: PackedTensor) -> "_Coded":
        codes, exponents = tensor.codes, tensor.exponents
        assert codes is not None
        assert exponents is not None
        classes = classes_of(codes)
        alive = classes > 0
        first = int(exponents[alive].min()) if alive.any() else 0
        living = codes[alive].T.reshape(-1)
        relative = np.where(alive, exponents - first, 0)
        return cls(tensor.name, classes, first, relative, living, tokens_of(living), codes.shape[1])

    @property
    def alphabets(self) -> tuple[int, int, int]:
        """How many different classes, exponents and tokens there may be."""
        classes, exponents, tokens = (int(a.max(initial=0)) + 1 for a in (self.classes, self.exponents, self.tokens))
        return classes, exponents, tokens

    @property
    def channel_parts(self) -> tuple[rans.Part, rans.Part]:
        """What is entropy-coded of the channels."""
        classes, exponents = _channel_parts(self.alphabets, len(self.classes))
        return replace(classes, symbols=self.classes), replace(exponents, symbols=self.exponents)

    @property
    def token_part(self) -> rans.Part:
        """What is entropy-coded of the weights."""
        return replace(_token_part(self.alphabets, self.classes, self.row), symbols=self.tokens)


def _channel_parts(alphabets: tuple[int, int, int], channels: int) -> tuple[rans.Part, rans.Part]:
    """All classes of a tensor, then all exponents."""
    contexts = np.zeros(channels, np.int32)
    return rans.Part(contexts, 1, alphabets[0]), rans.Part(contexts, 1, alphabets[1])


def _token_part(alphabets: tuple[int, int, int], classes: Integers, row: int) -> rans.Part:
    """The tokens of a tensor, with a table for each class."""
    contexts = np.tile((classes[classes > 0] - 1).astype(np.uint8), row)
    return rans.Part(contexts, max(alphabets[0] - 1, 1), alphabets[2])


def classes_of(codes: Integers) -> Integers:
    """Puts channels of like codes in a class: by the mean of their magnitudes, in half octaves.

    Args:
        codes: ``(channels, weights per channel)``.

    Returns:
        ``(channels,)`` from 0 to 63; 0 where all codes are 0, and no class below the largest is empty.
    """
    sums, row = np.abs(codes).sum(1, dtype=np.int64), codes.shape[1]
    halves = np.array([_half_octaves(int(n), row) for n in sums], np.int64)
    classes: Integers = np.zeros(len(codes), np.int64)
    classes[sums > 0] = np.minimum(np.unique(halves[sums > 0], return_inverse=True)[1] + 1, MOST_CLASSES - 1)
    return classes


def _half_octaves(total: int, count: int) -> int:
    """``2 log2(total / count)``, rounded to the nearest whole number; in integers, the same on every machine."""
    quarters = ((total**4 << 320) // count**4).bit_length() - 321 if total else 0
    return quarters + 1 >> 1


@dataclass(frozen=True, eq=False)
class _Layout:
    """A file in parts."""

    head: bytes
    channels: bytes
    tokens: bytes
    extra: bytes
    values: bytes

    @classmethod
    def of(cls, packed: Packed, coded: Sequence[_Coded]) -> "_Layout":
        channels = rans.encode([part for c in coded for part in c.channel_parts])
        tokens = rans.encode([c.token_part for c in coded])
        head = _head(packed, coded) + varint.write(len(channels)) + varint.write(len(tokens))
        extra = b"".join(extra_bits(c.codes) for c in coded)
        return cls(head, channels, tokens, extra, b"".join(map(value_bytes, packed.tensors)))

    def to_bytes(self) -> bytes:
        content = b"".join((self.head, self.channels, self.tokens, self.extra, self.values))
        return content + zlib.crc32(content).to_bytes(4, "little")


def to_bytes(packed: Packed) -> bytes:
    """Writes it down; the same for the same content, always.

    Args:
        packed: What is to be stored.

    Returns:
        The file.

    Raises:
        ValueError: If a name or a shape is longer than the format has room for.
    """
    return _Layout.of(packed, [_Coded.of(t) for t in packed.coded]).to_bytes()


@dataclass(frozen=True)
class PackedSize:
    """Where the bytes of a packed file go.

    Args:
        codes: For each coded tensor the bytes of its codes, rounded.
        channels: For each coded tensor the bytes of its channels' exponents and classes, rounded.
        values: For each tensor that is not coded its bytes.
        code_nbytes: Bytes of all codes.
        channel_nbytes: Bytes of the exponents and classes of all channels.
        structure_nbytes: Bytes of names, shapes and the checksum.
    """

    codes: Mapping[str, int]
    channels: Mapping[str, int]
    values: Mapping[str, int]
    code_nbytes: int
    channel_nbytes: int
    structure_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.code_nbytes + self.channel_nbytes + sum(self.values.values()) + self.structure_nbytes


def packed_size(packed: Packed) -> PackedSize:
    """Counts the bytes of :func:`to_bytes`.

    Args:
        packed: What would be stored.

    Returns:
        Their number, and what takes them.
    """
    coded = [_Coded.of(t) for t in packed.coded]
    layout = _Layout.of(packed, coded)
    of_tokens = rans.code_bits([c.token_part for c in coded])
    of_channels = rans.code_bits([part for c in coded for part in c.channel_parts])
    pairs = zip(of_channels[::2], of_channels[1::2], strict=True)
    return PackedSize(
        {c.name: round(bits / 8) + extra_nbytes(c.tokens) for c, bits in zip(coded, of_tokens, strict=True)},
        {c.name: round(sum(pair) / 8) for c, pair in zip(coded, pairs, strict=True)},
        {t.name: len(value_bytes(t)) for t in packed.tensors if t.codes is None},
        len(layout.tokens) + len(layout.extra),
        len(layout.channels),
        len(layout.head) + 4,
    )


def _storage(tensor: PackedTensor) -> int:
    if tensor.codes is not None:
        return CODED
    values = tensor.values
    assert values is not None
    if tensor.half:
        return HALF
    for storage in (INT8, INT16, INT32):
        if values.dtype in WIDER[storage]:
            limits = torch.iinfo(NARROW[storage])
            if not values.numel() or limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
                return storage
    return RAW


def stored_dtype(tensor: PackedTensor) -> torch.dtype:
    """The type that a tensor which is not coded has in a file: its own, or a narrower one that holds its values."""
    return NARROW.get(_storage(tensor), tensor.dtype)


def value_bytes(tensor: PackedTensor) -> bytes:
    """The bytes of a tensor that is not coded; none of one that is."""
    if tensor.values is None:
        return b""
    values = tensor.values.to(stored_dtype(tensor)).contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _head(packed: Packed, coded: Sequence[_Coded]) -> bytes:
    parts = [MAGIC, bytes([VERSION]), varint.write(len(packed.tensors))]
    by_name = {c.name: c for c in coded}
    previous = ""
    for tensor in packed.tensors:
        parts.append(name_bytes(tensor.name, previous))
        parts.append(bytes([DTYPES.index(tensor.dtype) | _storage(tensor) << 4]))
        parts += map(varint.write, (len(tensor.shape), *tensor.shape))
        if len(tensor.shape) > MOST_DIMS:
            raise ValueError(
                f"Expected {tensor.name!r} of at most {MOST_DIMS} dimensions, got {len(tensor.shape)}. Flatten it."
            )
        if tensor.axis is not None:
            one = by_name[tensor.name]
            first = varint.zigzag(one.first_exponent)
            parts += map(varint.write, (tensor.axis.dim, tensor.axis.groups, *one.alphabets, first))
        previous = tensor.name
    parts.append(varint.write(len(packed.attributes)))
    for name, value in packed.attributes.items():
        parts += [name_bytes(name, previous), varint.write(value)]
        previous = name
    return b"".join(parts)


def name_bytes(name: str, previous: str) -> bytes:
    """A name: its last part by number if it is a usual one, then what is not as in the name before it."""
    path, leaf, before = *_path_and_leaf(name), _path_and_leaf(previous)[0]
    one, other = path.encode(), before.encode()
    if len(one) > LONGEST_NAME:
        raise ValueError(f"Expected names of at most {LONGEST_NAME} bytes, got {name!r}. Give modules shorter ones.")
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return bytes([leaf]) + varint.write(shared) + varint.write(len(one) - shared) + one[shared:]


def _path_and_leaf(name: str) -> tuple[str, int]:
    """The module's path and the number of the last part; the whole name and 0 where that is not a usual one."""
    path, dot, leaf = name.rpartition(".")
    return (path, LEAVES.index(leaf)) if dot and leaf in LEAVES[1:] else (name, 0)


def from_bytes(data: bytes) -> Packed:
    """Inverse of :func:`to_bytes`.

    Args:
        data: A whole file.

    Returns:
        What was stored.

    Raises:
        PackedFileError: If these are not the bytes of a packed file of this version.
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
    of_channels, of_tokens = (reader.take(n) for n in lengths)
    rans.check_length(of_channels, rans.lane_count(2 * sum(head.channels for head in coded)))
    symbols = rans.decode(of_channels, [p for head in coded for p in _channel_parts(head.alphabets, head.channels)])
    classes = symbols[::2]
    exponents = [s.astype(np.int64) + head.first_exponent for s, head in zip(symbols[1::2], coded, strict=True)]

    counts = [int(np.count_nonzero(c)) * head.row for c, head in zip(classes, coded, strict=True)]
    rans.check_length(of_tokens, rans.lane_count(sum(counts)))
    parts = [_token_part(head.alphabets, c, head.row) for head, c in zip(coded, classes, strict=True)]
    codes = [join_tokens(t, reader.take(extra_nbytes(t))) for t in rans.decode(of_tokens, parts)]

    whole = {head.name: _rows(c, living, head.row) for head, c, living in zip(coded, classes, codes, strict=True)}
    steps = {head.name: e for head, e in zip(coded, exponents, strict=True)}
    tensors = tuple(
        PackedTensor(h.name, h.dtype, h.shape, axis=h.axis, codes=whole[h.name], exponents=steps[h.name])
        if h.axis is not None
        else PackedTensor(h.name, h.dtype, h.shape, reader.values(h), half=h.storage == HALF)
        for h in heads
    )
    reader.end()
    return Packed(tensors, attributes)


def _rows(classes: Integers, living: Integers, row: int) -> Integers:
    """The codes of all channels from those that are not all 0."""
    codes = np.zeros((len(classes), row), living.dtype)  # takes no memory for channels that are not written to
    codes[classes > 0] = living.reshape(row, np.count_nonzero(classes)).T
    return codes


@dataclass(frozen=True)
class _Head:
    """What the structure says of one tensor."""

    name: str
    dtype: torch.dtype
    storage: int
    shape: tuple[int, ...]
    axis: ChannelAxis | None = None
    alphabets: tuple[int, int, int] = (1, 1, 1)
    first_exponent: int = 0

    @property
    def channels(self) -> int:
        """Output channels of a coded tensor."""
        return self.shape[self.axis.dim] * self.axis.groups if self.axis is not None else 0

    @property
    def row(self) -> int:
        """Weights of each of its channels."""
        if self.axis is None:
            return 0
        return math.prod(n for d, n in enumerate(self.shape) if d != self.axis.dim) // self.axis.groups


class _Reader:
    """Takes a file apart from the front, and never reads past its end."""

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
        """The next bytes."""
        if count > len(self._data) - self._at:
            raise PackedFileError(f"Expected {count} bytes more, got {len(self._data) - self._at}. {_ADVICE}")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def number(self, largest: int = 1 << 40) -> int:
        """The next number."""
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
        """The next name, which begins as the one before it."""
        (leaf,) = self.take(1)
        before = _path_and_leaf(previous)[0].encode()
        shared = self.number(len(before))
        try:
            path = (before[:shared] + self.take(self.number(LONGEST_NAME - shared))).decode()
        except UnicodeDecodeError as error:
            raise PackedFileError(f"Expected a name in UTF-8. {_ADVICE}") from error
        if leaf >= len(LEAVES):
            raise PackedFileError(f"Expected a known name after {path!r}, got number {leaf}. {_ADVICE}")
        name = f"{path}.{LEAVES[leaf]}" if leaf else path
        if _path_and_leaf(name) != (path, leaf):
            raise PackedFileError(f"Expected the last word of {name!r} by its number. {_ADVICE}")
        return name

    def head(self) -> tuple[list[_Head], dict[str, int]]:
        """The structure: what is known of each tensor, and the numbers that shapes do not tell."""
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
        if math.prod(max(n, 1) for n in shape) > MOST_ENTRIES:
            raise PackedFileError(f"Expected a shape of {name!r} of at most 2^40 entries, got {shape}. {_ADVICE}")
        if storage != CODED:
            return _Head(name, dtype, storage, shape)
        axis = ChannelAxis(self.number(), self.number())
        alphabets = self.number(MOST_CLASSES), self.number(2 * EXPONENT_LIMIT), self.number(TOKENS)
        first = varint.from_zigzag(self.number())
        if axis.dim >= len(shape) or axis.groups < 1 or (axis.groups > 1 and (axis.dim == 0 or shape[0] % axis.groups)):
            raise PackedFileError(f"Expected channels of {name!r} {shape}, got {axis}. {_ADVICE}")
        if min(alphabets) < 1 or not -EXPONENT_LIMIT <= first <= EXPONENT_LIMIT - alphabets[1]:
            raise PackedFileError(
                f"Expected exponents of {name!r} from {-EXPONENT_LIMIT} to {EXPONENT_LIMIT - 1}, got {first} and "
                f"{alphabets} different classes, exponents and tokens. {_ADVICE}"
            )
        return _Head(name, dtype, storage, shape, axis, alphabets, first)

    def values(self, head: _Head) -> Tensor:
        """The values of a tensor that is not coded."""
        stored = NARROW.get(head.storage, head.dtype)
        count = math.prod(head.shape)
        content = bytearray(self.take(count * stored.itemsize))
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
        if stored == torch.bool:
            return (flat != 0).reshape(head.shape)
        return flat.view(stored).to(head.dtype).reshape(head.shape)

    def end(self) -> None:
        """Everything has to be read by now."""
        if self._at != len(self._data):
            raise PackedFileError(f"Expected the end of the file, found {len(self._data) - self._at} bytes. {_ADVICE}")
