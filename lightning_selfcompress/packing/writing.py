"""Writing of packed files. The size of a model is the number of bytes of its packed file."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lightning_selfcompress.packing import rans, varint
from lightning_selfcompress.packing.bounds import at_bounds, bounds_of, to_symbols
from lightning_selfcompress.packing.content import DTYPES, Packed, PackedTensor
from lightning_selfcompress.packing.structure import (
    CODED,
    HALF,
    INT8,
    INT16,
    INT32,
    LONGEST_NAME,
    MAGIC,
    MOST_CLASSES,
    MOST_DIMS,
    MOST_ENTRIES,
    NARROW,
    PARTS,
    RAW,
    VERSION,
    WIDER,
    Alphabets,
    Integers,
    channel_parts,
    entries,
    path_and_leaf,
    weight_part,
)
from lightning_selfcompress.packing.tokens import extra_bits, tokens_of


@dataclass(frozen=True, eq=False)
class _Coded:
    """A coded tensor in the form in which a file holds it.

    Args:
        name: Name of the tensor.
        classes: Class of each channel, ``(channels,)``: 0 if all codes are 0; every other class has its own table.
        first_exponent: The smallest exponent of the channels that are not in class 0, in sixteenths.
        exponents: Each exponent minus the first one, ``(channels,)``; 0 in class 0.
        bounds: Bound of each channel, ``(channels,)``; 0 if the channel has none.
        symbols: Symbols of all channels that are not in class 0: the first weight of each channel, then the second, ...
        extra: Extra bits of large codes.
        row: Number of weights per channel.
    """

    name: str
    classes: Integers
    first_exponent: int
    exponents: Integers
    bounds: Integers
    symbols: Integers
    extra: bytes
    row: int

    @classmethod
    def of(cls, tensor: PackedTensor) -> "_Coded":
        assert tensor.codes is not None
        codes, alive, exponents = tensor.codes.living, tensor.codes.alive, tensor.codes.exponents
        of_living = bounds_of(codes)
        classes, bounds = np.zeros((2, len(alive)), np.int16)
        classes[alive], bounds[alive] = classes_of(codes, of_living), of_living
        first = int(exponents[alive].min()) if alive.any() else 0
        tokens = tokens_of(codes.T.reshape(-1)).reshape(codes.T.shape)
        within = np.where(at_bounds(codes, of_living).T, 0, codes.T).reshape(-1)
        return cls(
            tensor.name,
            classes,
            first,
            np.where(alive, exponents - first, 0),
            bounds,
            to_symbols(tokens, codes.T, of_living).reshape(-1),
            extra_bits(within),
            codes.shape[1],
        )

    @property
    def alphabets(self) -> Alphabets:
        """The numbers of possible classes, exponents, bounds and symbols."""
        kinds = (self.classes, self.exponents, self.bounds, self.symbols)
        return Alphabets(*(int(kind.max(initial=0)) + 1 for kind in kinds))

    @property
    def channel_parts(self) -> list[rans.Part]:
        """The parts of the channel stream for this tensor."""
        parts = channel_parts(self.alphabets, len(self.classes))
        kinds = (self.classes, self.exponents, self.bounds)
        return [replace(part, symbols=kind) for part, kind in zip(parts, kinds, strict=True)]

    @property
    def weight_part(self) -> rans.Part:
        """The part of the weight stream for this tensor."""
        return replace(weight_part(self.alphabets, self.classes, self.row), symbols=self.symbols)


def classes_of(
    codes: Integers,  # (channels, weights per channel)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Groups channels with similar codes into classes.

    Channels without a bound are in one class if the means of their codes' magnitudes round to the same half octave.
    Channels with a bound are in one class if the shares of their codes within the bounds round to the same octave.

    Args:
        codes: Codes of the channels.
        bounds: Bound of each channel; 0 if the channel has none.

    Returns:
        Class of each channel, ``(channels,)``, from 0 to 63. Class 0 is for channels whose codes are all 0. Every class
        from 1 to the largest has a channel.
    """
    return number_classes(kinds_of(codes, bounds), np.zeros(len(codes), np.int64))


_UNBOUNDED, _BOUNDED, _KINDS = 1 << 8, 1 << 10, 1 << 11  # offsets of two sorts of kinds; all kinds are below the last


def kinds_of(
    codes: Integers,  # (channels, weights per channel)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Returns a number for each channel, ``(channels,)``: channels of one tensor with the same number form a class.

    The number is 0 for channels whose codes are all 0. It depends on no other channel.
    """
    sums, row = np.abs(codes).sum(1, dtype=np.int64), codes.shape[1]
    within = row - at_bounds(codes, bounds).sum(1)
    distinct, which = np.unique(np.where(bounds > 0, -within - 1, sums), return_inverse=True)
    kinds = [
        _BOUNDED + (_half_octaves(-n, row + 1) + 1 >> 1) if n < 0 else _UNBOUNDED + _half_octaves(n, row)
        for n in distinct.tolist()
    ]
    return np.where(sums > 0, np.array(kinds, np.int64)[which], 0)


def number_classes(
    kinds: Integers,  # (channels,)
    tensors: Integers,  # (channels,)
) -> Integers:
    """Numbers the classes of each tensor from 1; class 0 is for channels of kind 0.

    Args:
        kinds: Kinds of the channels, from :func:`kinds_of`.
        tensors: Number of the tensor to which each channel belongs.

    Returns:
        Class of each channel within its tensor, ``(channels,)``, from 0 to 63.
    """
    classes: Integers = np.zeros(len(kinds), np.int64)
    alive = kinds > 0
    distinct, which = np.unique(tensors[alive] * _KINDS + kinds[alive], return_inverse=True)
    first = np.searchsorted(distinct, distinct // _KINDS * _KINDS)  # the first class of the same tensor
    classes[alive] = np.minimum(np.arange(len(distinct)) - first + 1, MOST_CLASSES - 1)[which]
    return classes


def _half_octaves(total: int, count: int) -> int:
    """Returns ``2 log2(total / count)``, rounded, in integer arithmetic that gives the same result on every machine."""
    quarters = ((total**4 << 320) // count**4).bit_length() - 321 if total else 0
    return quarters + 1 >> 1


@dataclass(frozen=True, eq=False)
class _Layout:
    """The parts of a file, without the checksum."""

    head: bytes
    channels: bytes
    weights: bytes
    extra: bytes
    values: bytes

    @classmethod
    def of(cls, packed: Packed, coded: Sequence[_Coded]) -> "_Layout":
        channels = rans.encode([part for c in coded for part in c.channel_parts])
        weights = rans.encode([c.weight_part for c in coded])
        head = _head(packed, coded) + varint.write(len(channels)) + varint.write(len(weights))
        extra = b"".join(c.extra for c in coded)
        return cls(head, channels, weights, extra, b"".join(map(value_bytes, packed.tensors)))

    def to_bytes(self) -> bytes:
        content = b"".join((self.head, self.channels, self.weights, self.extra, self.values))
        return content + zlib.crc32(content).to_bytes(4, "little")


def to_bytes(packed: Packed) -> bytes:
    """Writes the content of a model as bytes; the same content always gives the same bytes.

    Args:
        packed: The content to store.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: If a name, or the dimensions or entries of a tensor, exceed the limits of the format.
    """
    return _Layout.of(packed, [_Coded.of(t) for t in packed.coded]).to_bytes()


@dataclass(frozen=True)
class PackedSize:
    """The size of a packed file by its parts.

    Args:
        codes: Bytes of the codes of each coded tensor, rounded, by name.
        channels: Bytes of the channels' exponents, bounds and classes of each coded tensor, rounded, by name.
        values: Bytes of each tensor that is not coded, by name.
        code_nbytes: Bytes of all codes.
        channel_nbytes: Bytes of the exponents, bounds and classes of all channels.
        structure_nbytes: Bytes of the head, which has names, shapes and attributes, and of the checksum.
    """

    codes: Mapping[str, int]
    channels: Mapping[str, int]
    values: Mapping[str, int]
    code_nbytes: int
    channel_nbytes: int
    structure_nbytes: int

    @property
    def nbytes(self) -> int:
        """The number of bytes of the whole file."""
        return self.code_nbytes + self.channel_nbytes + sum(self.values.values()) + self.structure_nbytes


def packed_size(packed: Packed) -> PackedSize:
    """Counts the bytes that :func:`to_bytes` writes.

    Args:
        packed: The content to store.

    Returns:
        The size of the file and of its parts.
    """
    coded = [_Coded.of(t) for t in packed.coded]
    layout = _Layout.of(packed, coded)
    of_weights = rans.code_bits([c.weight_part for c in coded])
    of_channels = np.reshape(rans.code_bits([part for c in coded for part in c.channel_parts]), (-1, PARTS)).sum(1)
    return PackedSize(
        {c.name: round(bits / 8) + len(c.extra) for c, bits in zip(coded, of_weights, strict=True)},
        {c.name: round(bits / 8) for c, bits in zip(coded, of_channels.tolist(), strict=True)},
        {t.name: len(value_bytes(t)) for t in packed.tensors if t.codes is None},
        len(layout.weights) + len(layout.extra),
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
    """Returns the dtype in which a file holds a tensor that is not coded: its own, or a narrower one for its values."""
    return NARROW.get(_storage(tensor), tensor.dtype)


def value_bytes(tensor: PackedTensor) -> bytes:
    """Returns the bytes of a tensor that is not coded; no bytes for a coded tensor."""
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
        if entries(tensor.shape) > MOST_ENTRIES:
            raise ValueError(f"Expected {tensor.name!r} of at most 2^40 entries, got {tuple(tensor.shape)}. Drop it.")
        if tensor.codes is not None:
            one = by_name[tensor.name]
            first = varint.zigzag(one.first_exponent)
            axis = tensor.codes.axis
            parts += map(varint.write, (axis.dim, axis.groups, *one.alphabets, first))
        previous = tensor.name
    parts.append(varint.write(len(packed.attributes)))
    for name, value in packed.attributes.items():
        parts += [name_bytes(name, previous), varint.write(value)]
        previous = name
    return b"".join(parts)


def name_bytes(name: str, previous: str) -> bytes:
    """Encodes a name: the number of its last word, then its path without the bytes shared with the previous path."""
    path, leaf, before = *path_and_leaf(name), path_and_leaf(previous)[0]
    one, other = path.encode(), before.encode()
    if len(one) > LONGEST_NAME:
        raise ValueError(f"Expected names of at most {LONGEST_NAME} bytes, got {name!r}. Give modules shorter ones.")
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return bytes([leaf]) + varint.write(shared) + varint.write(len(one) - shared) + one[shared:]
