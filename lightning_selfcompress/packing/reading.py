"""Reading of packed files, with checks of every field."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from lightning_selfcompress.errors import PackedFileError
from lightning_selfcompress.packing import rans
from lightning_selfcompress.packing.bounds import put_bounds, to_tokens
from lightning_selfcompress.packing.content import Codes, Packed, PackedTensor
from lightning_selfcompress.packing.fields import ADVICE, Head, Reader
from lightning_selfcompress.packing.narrow_floats import (
    LARGEST,
    LEAST_SCALE,
    MOST_SCALE,
    from_logarithmic,
    from_scaled_int8,
)
from lightning_selfcompress.packing.storages import CONSTANT, LOGARITHMIC, NARROW, SCALED
from lightning_selfcompress.packing.structure import (
    EXPONENT_LIMIT,
    MAGIC,
    Integers,
    channel_parts,
    class_part,
    weight_part,
)
from lightning_selfcompress.packing.tokens import TOKENS, extra_nbytes, join_tokens


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
        raise PackedFileError(f"Expected entropy-coded weights: {error} {ADVICE}") from error
    except MemoryError as error:
        raise PackedFileError("Expected a network that fits the memory, got one of more weights than that.") from error


def _read(data: bytes) -> Packed:
    reader = Reader(data)
    heads, attributes = reader.heads()
    coded = [head for head in heads if head.axis is not None]
    known = dict(zip((h.name for h in coded), _decoded(coded, reader), strict=True)) if coded else {}
    tensors = tuple(
        known[h.name] if h.name in known else PackedTensor(h.name, h.dtype, h.shape, _values(h, reader)) for h in heads
    )
    reader.end()
    return Packed(tensors, attributes)


def _decoded(coded: list[Head], reader: Reader) -> list[PackedTensor]:
    """Decodes the coded tensors: all classes first, which tell how much follows, then exponents and bounds, then codes.

    Each step checks that the file has a state for each lane before memory is allocated for its symbols.
    """
    decoder = reader.decoder()
    decoder.begin(sum(head.channels for head in coded))
    classes = decoder.decode([class_part(head.alphabets, head.channels) for head in coded])
    living = [int(np.count_nonzero(c)) for c in classes]
    decoder.begin(2 * sum(living))
    found = decoder.decode([p for head, n in zip(coded, living, strict=True) for p in channel_parts(head.alphabets, n)])
    decoder.begin(sum(head.row * n for head, n in zip(coded, living, strict=True)))
    symbols = decoder.decode([weight_part(head.alphabets, c, head.row) for head, c in zip(coded, classes, strict=True)])
    reader.go_on(decoder)
    return [
        _coded(head, c, e, _codes(s.reshape(head.row, len(b)), b, reader))
        for head, c, e, b, s in zip(coded, classes, found[::2], found[1::2], symbols, strict=True)
    ]


def _codes(symbols: Integers, bounds: Integers, reader: Reader) -> Integers:
    """Returns the codes of symbols, ``(channels, weights per channel)``; takes their extra bits from the reader."""
    tokens = to_tokens(symbols, bounds)
    if int(tokens.max(initial=0)) >= TOKENS:
        raise PackedFileError(f"Expected tokens below {TOKENS}. {ADVICE}")
    codes = join_tokens(tokens.reshape(-1), reader.take(extra_nbytes(tokens)))
    return np.ascontiguousarray(put_bounds(codes.reshape(symbols.shape), symbols, bounds).T)


def _coded(head: Head, classes: Integers, relative: Integers, codes: Integers) -> PackedTensor:
    """Makes a coded tensor. A channel of a class other than 0 whose codes are all 0 is treated as one of class 0."""
    alive, living = classes > 0, codes.any(1)
    exponents = np.full(len(classes), head.first_exponent, np.int16)
    exponents[alive] += relative.astype(np.int16)
    if not living.all():
        alive[alive], codes = living, codes[living]
    assert head.axis is not None
    return PackedTensor(head.name, head.dtype, head.shape, codes=Codes(head.axis, alive, codes, exponents))


def _values(head: Head, reader: Reader) -> Tensor:
    """Reads the values of a tensor that is not coded; one value stands for all entries if they are the same."""
    count = 1 if head.storage == CONSTANT else math.prod(head.shape)
    if head.storage == SCALED:
        scale = reader.signed(EXPONENT_LIMIT)
        integers = np.frombuffer(reader.take(count), np.int8)
        if not LEAST_SCALE <= scale <= MOST_SCALE or int(integers.min(initial=0)) < -LARGEST:
            raise PackedFileError(f"Expected integers from -127 to 127 in {head.name!r}, and a scale. {ADVICE}")
        return from_scaled_int8(scale, integers).reshape(head.shape)
    if head.storage == LOGARITHMIC:
        first = reader.signed(EXPONENT_LIMIT)
        numbers = np.frombuffer(reader.take(count), np.uint8)
        if first + int(numbers.max(initial=0)) >= EXPONENT_LIMIT:
            raise PackedFileError(f"Expected exponents of {head.name!r} below {EXPONENT_LIMIT}. {ADVICE}")
        return from_logarithmic(first, numbers).reshape(head.shape)
    stored = NARROW.get(head.storage, head.dtype)
    content = bytearray(reader.take(count * stored.itemsize))
    flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
    values = flat != 0 if stored == torch.bool else flat.view(stored).to(head.dtype)
    return values[0].expand(head.shape) if head.storage == CONSTANT else values.reshape(head.shape)
