"""The differences of two files, tensor by tensor, as packed files of both networks would hold the tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_selfcompress.cli.contents import Contents, channel_bits, type_name
from lightning_selfcompress.packing import PackedTensor, as_it_is, stored_dtype


@dataclass(frozen=True)
class Side:
    """A tensor in one of two files.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype in the network.
        stored_as: Dtype in a packed file; ``"codes"`` if the tensor is compressed.
        bits: Bits per weight as integer codes, with one width per channel; None if the tensor is not compressed.
        nbytes: Bytes in a packed file.
    """

    shape: tuple[int, ...]
    dtype: str
    stored_as: str
    bits: float | None
    nbytes: int


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two files.

    Args:
        name: Name of the tensor.
        a: The tensor in the first file; None if the file does not have it.
        b: The tensor in the second file; None if the file does not have it.
        largest: The largest absolute difference of two values; None if the shapes differ or a file lacks the tensor.
    """

    name: str
    a: Side | None
    b: Side | None
    largest: float | None


def differences(a: Contents, b: Contents) -> tuple[Difference, ...]:
    """Compares two files: the shapes, dtypes, bits, bytes and values of their tensors.

    Args:
        a: The first file.
        b: The second file.

    Returns:
        An entry for each tensor that differs, in the order of the first file; empty if both hold the same network.
    """
    numbers = a.whole_network and b.whole_network
    one, other = _tensors(a, numbers=numbers), _tensors(b, numbers=numbers)
    found = []
    for name in one | other:
        left, right = one.get(name), other.get(name)
        sides = [None if t is None else _side(t, c) for t, c in ((left, a), (right, b))]
        largest = None
        if left is not None and right is not None and left.shape == right.shape:
            largest = 0.0 if _same_values(left, right) else largest_difference(left.tensor(), right.tensor())
        if sides[0] != sides[1] or largest or not _same_bits(left, right):
            found.append(Difference(name, sides[0], sides[1], largest))
    return tuple(found)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference of two tensors of one shape; two NaN count as equal."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gaps = torch.where(same, 0.0, (a - b).abs())
    return float(gaps.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if gaps.numel() else 0.0


def _tensors(contents: Contents, *, numbers: bool) -> dict[str, PackedTensor]:
    found = {t.name: t for t in contents.packed.tensors}
    if numbers:
        found |= {name: as_it_is(name, torch.tensor(n)) for name, n in contents.packed.attributes.items()}
    return found


def _side(tensor: PackedTensor, contents: Contents) -> Side:
    size, dtype = contents.size, type_name(tensor.dtype)
    if tensor.codes is None:
        return Side(tensor.shape, dtype, type_name(stored_dtype(tensor)), None, size.values.get(tensor.name, 0))
    bits = channel_bits(tensor).double()
    mean = float(bits.mean()) if len(bits) else 0.0
    return Side(tensor.shape, dtype, "codes", mean, size.codes[tensor.name] + size.channels[tensor.name])


def _same_values(a: PackedTensor, b: PackedTensor) -> bool:
    """Returns whether two weights have equal codes, which are compared without memory for channels of zeros."""
    return a.codes is not None and b.codes is not None and a.dtype == b.dtype and a.codes.same_as(b.codes)


def _same_bits(a: PackedTensor | None, b: PackedTensor | None) -> bool:
    """Returns whether each channel needs the same whole bits in two tensors; True unless both are compressed."""
    if a is None or b is None or a.codes is None or b.codes is None:
        return True
    return torch.equal(channel_bits(a), channel_bits(b))
