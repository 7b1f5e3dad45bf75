"""The bytes of a packed file, whose number is the size of a model."""

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
    """A coded tensor as it is written.

    Args:
        name: Its name.
        classes: Class of each channel, ``(channels,)``: 0 where all codes are 0; the others have a table each.
        first_exponent: The smallest exponent, in sixteenths.
        exponents: The exponents less the smallest one, ``(channels,)``; 0 in class 0.
        bounds: The bound of each channel, ``(channels,)``; 0 where it has none.
        symbols: Of the channels that are not in class 0: first weights of all channels, second weights, ...
        extra: Lower bits of large codes.
        row: Weights of a channel.
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
        """How many different numbers of each kind there may be."""
        kinds = (self.classes, self.exponents, self.bounds, self.symbols)
        return Alphabets(*(int(kind.max(initial=0)) + 1 for kind in kinds))

    @property
    def channel_parts(self) -> list[rans.Part]:
        """What is entropy-coded of the channels."""
        parts = channel_parts(self.alphabets, len(self.classes))
        kinds = (self.classes, self.exponents, self.bounds)
        return [replace(part, symbols=kind) for part, kind in zip(parts, kinds, strict=True)]

    @property
    def weight_part(self) -> rans.Part:
        """What is entropy-coded of the weights."""
        return replace(weight_part(self.alphabets, self.classes, self.row), symbols=self.symbols)


def classes_of(
    codes: Integers,  # (channels, weights per channel)
    bounds: Integers,  # (channels,)
) -> Integers:
    """Puts channels of like codes in a class.

    Channels are put together by the mean of their codes' magnitudes, in half octaves; channels that have a bound by the
    share of their codes that are not at the bound, in octaves.

    Args:
        codes: Codes.
        bounds: Bounds of the channels, or 0.

    Returns:
        ``(channels,)`` from 0 to 63; 0 where all codes are 0, and no class below the largest is empty.
    """
    sums, row = np.abs(codes).sum(1, dtype=np.int64), codes.shape[1]
    within = row - at_bounds(codes, bounds).sum(1)
    kinds = [
        _BOUNDED + (_half_octaves(int(rest) + 1, row + 1) + 1 >> 1) if bound else _half_octaves(int(total), row)
        for total, rest, bound in zip(sums, within, bounds, strict=True)
    ]
    classes: Integers = np.zeros(len(codes), np.int64)
    alive = sums > 0
    classes[alive] = np.minimum(np.unique(np.array(kinds)[alive], return_inverse=True)[1] + 1, MOST_CLASSES - 1)
    return classes


_BOUNDED = 1 << 10  # apart from all means of magnitudes


def _half_octaves(total: int, count: int) -> int:
    """``2 log2(total / count)``, rounded to the nearest whole number; in integers, the same on every machine."""
    quarters = ((total**4 << 320) // count**4).bit_length() - 321 if total else 0
    return quarters + 1 >> 1


@dataclass(frozen=True, eq=False)
class _Layout:
    """A file in parts."""

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
        channels: For each coded tensor the bytes of its channels' exponents, bounds and classes, rounded.
        values: For each tensor that is not coded its bytes.
        code_nbytes: Bytes of all codes.
        channel_nbytes: Bytes of the exponents, bounds and classes of all channels.
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
        The number of bytes, and what they are spent on.
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
    """A name: its last part by number if it is a usual one, then what is not as in the name before it."""
    path, leaf, before = *path_and_leaf(name), path_and_leaf(previous)[0]
    one, other = path.encode(), before.encode()
    if len(one) > LONGEST_NAME:
        raise ValueError(f"Expected names of at most {LONGEST_NAME} bytes, got {name!r}. Give modules shorter ones.")
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return bytes([leaf]) + varint.write(shared) + varint.write(len(one) - shared) + one[shared:]
