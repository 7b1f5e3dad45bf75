"""Reading of the fields of a packed file: numbers, names, heads of tensors and attributes, with checks of each."""

import math
import zlib
from dataclasses import dataclass

import torch

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import rans, varint
from lightning_selfcompress.packing.bounds import LARGEST_BOUND, WITHIN
from lightning_selfcompress.packing.content import DTYPES
from lightning_selfcompress.packing.levels import LEVELS, SHARES, Classes
from lightning_selfcompress.packing.storages import CODED, CONSTANT, SCALED, VECTOR_FORMS, WIDER
from lightning_selfcompress.packing.structure import (
    CHANNELS_BEFORE,
    DROPPED,
    EXPONENT_BEFORE,
    EXPONENT_LIMIT,
    FORM_SHIFT,
    GENERAL,
    LEAF_MASK,
    LEAVES,
    LONGEST_NAME,
    MAGIC,
    MOST_DIMS,
    MOST_ENTRIES,
    PLAIN_CODED,
    SAME_PATH,
    SQUARE,
    VERSION,
    WEIGHT,
    WITH_BIAS,
    Alphabets,
    entries,
    path_and_leaf,
)
from lightning_selfcompress.packing.tokens import TOKENS
from lightning_selfcompress.quantize.channel_axis import ChannelAxis

ADVICE = "The file is damaged; take another copy."


_NONE = Alphabets()


@dataclass(frozen=True)
class Head:
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


class Reader:
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
            raise PackedFileError(f"Expected a checksum that fits the content. {ADVICE}")
        self._data, self._at, self._held = memoryview(data)[:-4], len(MAGIC) + 1, 0
        self._path, self._channels, self._exponent = b"", 0, EXPONENT_BEFORE

    def take(self, count: int) -> bytes:
        """Reads the next ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise PackedFileError(f"Expected {count} bytes more, got {len(self._data) - self._at}. {ADVICE}")
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
        raise PackedFileError(f"Expected a number up to {largest}. {ADVICE}")

    def signed(self, limit: int) -> int:
        """Reads the next number of either sign, of a magnitude up to ``limit``."""
        return varint.from_zigzag(self.number(2 * limit))

    def heads(self) -> tuple[list[Head], dict[str, int]]:
        """Reads the heads of all tensors and the attributes, which are integers that do not follow from shapes."""
        heads: list[Head] = []
        count, has_attributes = divmod(self.number(1 << 41), 2)
        while len(heads) < count:
            heads += self._tensor()
        attributes = []
        for _ in range(self.number() if has_attributes else 0):
            name, form = self._name()
            if form != GENERAL:
                raise PackedFileError(f"Expected an attribute {name!r}, got a tensor of form {form}. {ADVICE}")
            attributes.append((name, self.number()))
        names = {head.name for head in heads}
        if not len(heads) == count == len(names) or len(dict(attributes)) < len(attributes):
            raise PackedFileError(f"Expected every name once. {ADVICE}")
        return heads, dict(attributes)

    def decoder(self) -> rans.Decoder:
        """Returns a decoder of all that follows."""
        return rans.Decoder(self._data[self._at :])

    def go_on(self, decoder: rans.Decoder) -> None:
        """Continues with what the decoder has left, when all is decoded."""
        held, after = decoder.end()
        self._data, self._at, self._held = memoryview(held + after), 0, len(held)

    def end(self) -> None:
        """Checks that the whole file has been read, but for zeros in the states of lanes that needed no bytes.

        Raises:
            PackedFileError: If bytes are left.
        """
        left = len(self._data) - max(self._at, self._held)
        if left or any(self._data[self._at :]):
            raise PackedFileError(f"Expected the end of the file, found {left} bytes. {ADVICE}")

    def _name(self) -> tuple[str, int]:
        """Reads the next name, the path of which begins as the path before, and the form of the tensor head."""
        (tag,) = self.take(1)
        leaf, path = tag & LEAF_MASK, self._path
        if not tag & SAME_PATH:
            more, dropped = divmod(self.number((DROPPED + 1) * (LONGEST_NAME + 1)), DROPPED + 1)
            dropped += self.number(len(path)) if dropped == DROPPED else 0
            if dropped > len(path) or len(path) - dropped + more > LONGEST_NAME:
                raise PackedFileError(f"Expected a path of at most {LONGEST_NAME} bytes. {ADVICE}")
            path = path[: len(path) - dropped] + self.take(more)
        try:
            text = path.decode()
        except UnicodeDecodeError as error:
            raise PackedFileError(f"Expected a name in UTF-8. {ADVICE}") from error
        if leaf >= len(LEAVES):
            raise PackedFileError(f"Expected a known name after {text!r}, got number {leaf}. {ADVICE}")
        name = f"{text}.{LEAVES[leaf]}" if leaf else text
        if path_and_leaf(name) != (text, leaf):
            raise PackedFileError(f"Expected the last word of {name!r} by its number. {ADVICE}")
        self._path = path
        return name, tag >> FORM_SHIFT

    def _tensor(self) -> list[Head]:
        """Reads the head of one tensor, or of a weight and its bias."""
        name, form = self._name()
        if form in VECTOR_FORMS:
            if VECTOR_FORMS[form] == CONSTANT and not self._channels:
                raise PackedFileError(f"Expected entries in {name!r}, got none of one value. {ADVICE}")
            return [Head(name, torch.float32, VECTOR_FORMS[form], (self._channels,))]
        if form == GENERAL:
            return [self._general(name)]
        assert form in (PLAIN_CODED, WITH_BIAS)
        head = self._coded(name, torch.float32, self._plain_shape(), plain=True)
        if form == PLAIN_CODED:
            return [head]
        path, leaf = path_and_leaf(name)
        if leaf != WEIGHT:
            raise PackedFileError(f"Expected a weight that has a bias, got {name!r}. {ADVICE}")
        return [head, Head(f"{path}.bias", torch.float32, SCALED, (self._channels,))]

    def _general(self, name: str) -> Head:
        (kind,) = self.take(1)
        storage = kind >> 4
        if kind & 15 >= len(DTYPES) or storage > CONSTANT:
            raise PackedFileError(f"Expected a known type of {name!r}, got {kind}. {ADVICE}")
        dtype = DTYPES[kind & 15]
        if not dtype.is_floating_point if storage == CODED else dtype not in WIDER.get(storage, DTYPES):
            raise PackedFileError(f"Expected {name!r} stored in a narrower type than {dtype}, got {kind}. {ADVICE}")
        shape = tuple(self.number() for _ in range(self.number(MOST_DIMS)))
        if storage == CODED:
            return self._coded(name, dtype, shape)
        if entries(shape) > MOST_ENTRIES or (storage == CONSTANT and 0 in shape):
            raise PackedFileError(f"Expected a shape of {name!r} of up to 2^40 entries, got {shape}. {ADVICE}")
        self._channels = shape[0] if len(shape) == 1 else self._channels
        return Head(name, dtype, storage, shape)

    def _plain_shape(self) -> tuple[int, ...]:
        flags = self.number(MOST_DIMS + CHANNELS_BEFORE + SQUARE)
        dims, before, square = flags % CHANNELS_BEFORE, flags & CHANNELS_BEFORE, flags & SQUARE
        if dims > MOST_DIMS or (before and dims < 2) or (square and dims < 3):
            raise PackedFileError(f"Expected a number of dimensions, got {flags}. {ADVICE}")
        shape: list[int] = []
        for d in range(dims):
            repeated = square and d == dims - 1
            shape.append(self._channels if before and d == 1 else shape[-1] if repeated else self.number())
        return tuple(shape)

    def _coded(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], *, plain: bool = False) -> Head:
        if 0 in shape or entries(shape) > MOST_ENTRIES:
            raise PackedFileError(
                f"Expected 1 to 2^40 entries in {name!r}, which has codes, got the shape {shape}. {ADVICE}"
            )
        axis = ChannelAxis() if plain else ChannelAxis(self.number(), self.number())
        if axis.dim >= len(shape) or axis.groups < 1 or (axis.groups > 1 and (axis.dim == 0 or shape[0] % axis.groups)):
            raise PackedFileError(f"Expected channels of {name!r} {shape}, got {axis}. {ADVICE}")
        numbers, has_shares = divmod(self.number(2 * LEVELS * (LEVELS + 1)), 2)
        levels, first_level = divmod(numbers, LEVELS)
        exponents = self.number(2 * EXPONENT_LIMIT)
        first = self._exponent + self.signed(2 * EXPONENT_LIMIT)
        symbols = self.number(TOKENS + WITHIN)
        shares, first_share = divmod(self.number(SHARES * (SHARES + 1)), SHARES) if has_shares else (0, 0)
        bounds = self.number(LARGEST_BOUND + 1) if has_shares else 1
        classes = Classes(first_level, levels, first_share, shares)
        possible = first_level + levels <= LEVELS and first_share + shares <= SHARES and shares >= has_shares
        if not possible or not min(exponents, symbols, bounds):
            raise PackedFileError(f"Expected possible classes, exponents, bounds and symbols of {name!r}. {ADVICE}")
        if not -EXPONENT_LIMIT <= first <= EXPONENT_LIMIT - exponents:
            raise PackedFileError(
                f"Expected exponents of {name!r} from {-EXPONENT_LIMIT} to {EXPONENT_LIMIT - 1}, got {exponents} from "
                f"{first} on. {ADVICE}"
            )
        alphabets = Alphabets(classes, exponents, bounds, symbols)
        head = Head(name, dtype, CODED, shape, axis, alphabets, first)
        self._exponent, self._channels = first, head.channels
        return head
