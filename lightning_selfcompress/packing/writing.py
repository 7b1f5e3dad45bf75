"""Writing of packed files. The size of a model is the number of bytes of its packed file."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lightning_selfcompress.packing import rans
from lightning_selfcompress.packing.bounds import at_bounds, bounds_of, to_symbols
from lightning_selfcompress.packing.content import Packed, PackedTensor
from lightning_selfcompress.packing.heads import head_bytes
from lightning_selfcompress.packing.levels import kinds_of, number_classes
from lightning_selfcompress.packing.storages import NARROW, to_stored
from lightning_selfcompress.packing.structure import (
    EXPONENT_BEFORE,
    Alphabets,
    Integers,
    channel_parts,
    class_part,
    weight_part,
)
from lightning_selfcompress.packing.tokens import extra_bits, tokens_of


@dataclass(frozen=True, eq=False)
class _Coded:
    """A coded tensor in the form in which a file holds it.

    Args:
        name: Name of the tensor.
        alphabets: The numbers of possible classes, exponents, bounds and symbols.
        classes: Class of each channel, ``(channels,)``: 0 if all codes are 0; every other class has its own table.
        first_exponent: The smallest exponent of the channels that are not in class 0, in sixteenths.
        exponents: Each exponent minus the first one, ``(channels that are not in class 0,)``.
        bounds: Bound of each channel, ``(channels that are not in class 0,)``; 0 if the channel has none.
        symbols: Symbols of all channels that are not in class 0: the first weight of each channel, then the second, ...
        extra: Extra bits of large codes.
        row: Number of weights per channel.
    """

    name: str
    alphabets: Alphabets
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
        codes, alive = tensor.codes.living, tensor.codes.alive
        bounds, exponents = bounds_of(codes), tensor.codes.exponents[alive]
        classes = np.zeros(len(alive), np.int16)
        classes[alive], (kinds,) = number_classes(kinds_of(codes, bounds), np.zeros(len(codes), np.int64), 1)
        first = int(exponents.min()) if len(exponents) else EXPONENT_BEFORE
        tokens = tokens_of(codes.T.reshape(-1)).reshape(codes.T.shape)
        symbols = to_symbols(tokens, codes.T, bounds).reshape(-1)
        sizes = (int(kind.max(initial=0)) + 1 for kind in (exponents - first, bounds, symbols))
        within = np.where(at_bounds(codes, bounds).T, 0, codes.T).reshape(-1)
        return cls(
            tensor.name,
            Alphabets(kinds, *sizes),
            classes,
            first,
            exponents - first,
            bounds,
            symbols,
            extra_bits(within),
            codes.shape[1],
        )

    @property
    def class_part(self) -> rans.Part:
        """The part of the channels' classes."""
        return replace(class_part(self.alphabets, len(self.classes)), symbols=self.classes)

    @property
    def channel_parts(self) -> list[rans.Part]:
        """The parts of the exponents and the bounds."""
        parts = channel_parts(self.alphabets, len(self.exponents))
        return [replace(part, symbols=kind) for part, kind in zip(parts, (self.exponents, self.bounds), strict=True)]

    @property
    def weight_part(self) -> rans.Part:
        """The part of the weights' symbols."""
        return replace(weight_part(self.alphabets, self.classes, self.row), symbols=self.symbols)


def _groups(coded: Sequence[_Coded]) -> list[list[rans.Part]]:
    """Returns the parts that are entropy-coded: all classes, then all exponents and bounds, then all weights."""
    return [[c.class_part for c in coded], [p for c in coded for p in c.channel_parts], [c.weight_part for c in coded]]


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
        Class of each channel, ``(channels,)``, from 0 to 94. Class 0 is for channels whose codes are all 0.
    """
    return number_classes(kinds_of(codes, bounds), np.zeros(len(codes), np.int64), 1)[0]


@dataclass(frozen=True, eq=False)
class _Layout:
    """The parts of a file, without the checksum."""

    head: bytes
    stream: bytes
    values: bytes

    @classmethod
    def of(cls, packed: Packed, coded: Sequence[_Coded]) -> "_Layout":
        values = b"".join(map(value_bytes, packed.tensors))
        rest = b"".join(c.extra for c in coded) + values
        stream = rans.encode(_groups(coded), rest) if coded else rest
        return cls(head_bytes(packed, [(c.alphabets, c.first_exponent) for c in coded]), stream, values)

    def to_bytes(self) -> bytes:
        content = self.head + self.stream
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
    groups = _groups(coded)
    lanes = rans.lanes_of([sum(len(part.contexts) for part in parts) for parts in groups])
    of_classes, of_others, of_weights = (rans.code_bits(*group) for group in zip(groups, lanes, strict=True))
    of_channels = np.array(of_classes) + np.reshape(of_others, (-1, 2)).sum(1)
    channel_nbytes = round(of_channels.sum() / 8)
    return PackedSize(
        {c.name: round(bits / 8) + len(c.extra) for c, bits in zip(coded, of_weights, strict=True)},
        {c.name: round(bits / 8) for c, bits in zip(coded, of_channels.tolist(), strict=True)},
        {t.name: len(value_bytes(t)) for t in packed.tensors if t.codes is None},
        len(layout.stream) - len(layout.values) - channel_nbytes,
        channel_nbytes,
        len(layout.head) + 4,
    )


def stored_dtype(tensor: PackedTensor) -> torch.dtype:
    """Returns the dtype in which a file holds a tensor that is not coded: its own, or a narrower one for its values."""
    return NARROW.get(tensor.storage, tensor.dtype)


def value_bytes(tensor: PackedTensor) -> bytes:
    """Returns the bytes of a tensor that is not coded; no bytes for a coded tensor."""
    return b"" if tensor.values is None else to_stored(tensor.values, tensor.storage)
