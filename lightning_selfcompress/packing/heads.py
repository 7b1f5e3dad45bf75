"""Writing of the head of a packed file: the names, dtypes, shapes and alphabets of all tensors, and the attributes."""

from collections.abc import Sequence

import torch

from lightning_selfcompress.packing import varint
from lightning_selfcompress.packing.content import DTYPES, Packed, PackedTensor
from lightning_selfcompress.packing.levels import LEVELS, SHARES
from lightning_selfcompress.packing.storages import SCALED, VECTOR_FORMS
from lightning_selfcompress.packing.structure import (
    BIAS,
    CHANNELS_BEFORE,
    DROPPED,
    EXPONENT_BEFORE,
    FORM_SHIFT,
    GENERAL,
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
from lightning_selfcompress.quantize.channel_axis import ChannelAxis

_FORMS = {storage: form for form, storage in VECTOR_FORMS.items()}


class HeadWriter:
    """Writes the heads of tensors and the attributes one after another.

    Attributes:
        content: What is written so far.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self._path = b""
        self._channels = 0  # channels of the last coded tensor, or entries of the last vector, whichever came last
        self._exponent = EXPONENT_BEFORE

    def coded(
        self, tensor: PackedTensor, axis: ChannelAxis, alphabets: Alphabets, first_exponent: int, *, bias: bool
    ) -> None:
        """Writes the head of a coded tensor; with ``bias``, it stands for the head of the following bias as well."""
        plain = tensor.dtype == torch.float32 and axis == ChannelAxis()
        if plain:
            self._name(tensor.name, WITH_BIAS if bias else PLAIN_CODED)
            self._plain_shape(tensor.shape)
        else:
            self._name(tensor.name, GENERAL)
            self._general(tensor)
            self._numbers(axis.dim, axis.groups)
        classes = alphabets.classes
        self._numbers(bool(classes.shares) + 2 * (classes.first_level + LEVELS * classes.levels), alphabets.exponents)
        self._numbers(varint.zigzag(first_exponent - self._exponent), alphabets.symbols)
        if classes.shares:
            self._numbers(classes.first_share + SHARES * classes.shares, alphabets.bounds)
        self._exponent, self._channels = first_exponent, tensor.shape[axis.dim] * axis.groups

    def plain(self, tensor: PackedTensor) -> None:
        """Writes the head of a tensor that is not coded."""
        if tensor.dtype == torch.float32 and tensor.shape == (self._channels,) and tensor.storage in _FORMS:
            self._name(tensor.name, _FORMS[tensor.storage])
        else:
            self._name(tensor.name, GENERAL)
            self._general(tensor)
            self._channels = tensor.shape[0] if len(tensor.shape) == 1 else self._channels

    def attribute(self, name: str, value: int) -> None:
        """Writes an attribute."""
        self._name(name, GENERAL)
        self._numbers(value)

    def _numbers(self, *numbers: int) -> None:
        self.content += b"".join(map(varint.write, numbers))

    def _name(self, name: str, form: int) -> None:
        path, leaf = path_and_leaf(name)
        new, old = path.encode(), self._path
        if len(new) > LONGEST_NAME:
            raise ValueError(
                f"Expected names of at most {LONGEST_NAME} bytes, got {name!r}. Give modules shorter ones."
            )
        self.content.append(leaf | (new == old) * SAME_PATH | form << FORM_SHIFT)
        if new != old:
            shared = next(
                (i for i, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), min(len(new), len(old))
            )
            dropped = len(old) - shared
            self._numbers(min(dropped, DROPPED) + (DROPPED + 1) * (len(new) - shared))
            if dropped >= DROPPED:
                self._numbers(dropped - DROPPED)
            self.content += new[shared:]
        self._path = new

    def _plain_shape(self, shape: tuple[int, ...]) -> None:
        sizes = list(shape)
        square = len(shape) > 2 and shape[-1] == shape[-2]
        before = len(shape) > 1 and shape[1] == self._channels
        if square:
            sizes.pop()
        if before:
            sizes.pop(1)
        self._numbers(len(shape) + before * CHANNELS_BEFORE + square * SQUARE, *sizes)

    def _general(self, tensor: PackedTensor) -> None:
        self.content.append(DTYPES.index(tensor.dtype) | tensor.storage << 4)
        self._numbers(len(tensor.shape), *tensor.shape)


def head_bytes(packed: Packed, alphabets: Sequence[tuple[Alphabets, int]]) -> bytes:
    """Returns the bytes of a file up to the entropy-coded parts.

    Args:
        packed: The content.
        alphabets: The alphabets and the first exponent of each coded tensor.

    Raises:
        ValueError: If a name, or the dimensions or entries of a tensor, exceed the limits of the format.
    """
    writer, of_coded = HeadWriter(), iter(alphabets)
    writer.content += MAGIC + bytes([VERSION])
    writer.content += varint.write(2 * len(packed.tensors) + bool(packed.attributes))
    told = None  # the tensor that the head of the tensor before stands for as well
    for tensor, following in zip(packed.tensors, (*packed.tensors, None)[1:], strict=True):
        _check_limits(tensor)
        if tensor.codes is not None:
            told = following if following is not None and has_bias(tensor, following) else None
            writer.coded(tensor, tensor.codes.axis, *next(of_coded), bias=told is not None)
        elif tensor is not told:
            writer.plain(tensor)
    if packed.attributes:
        writer.content += varint.write(len(packed.attributes))
    for name, value in packed.attributes.items():
        writer.attribute(name, value)
    return bytes(writer.content)


def has_bias(coded: PackedTensor, following: PackedTensor) -> bool:
    """Returns whether the tensor after a coded one is the bias of the same layer, in the form that needs no head."""
    if coded.codes is None or coded.dtype != torch.float32:
        return False
    (path, leaf), (path_after, leaf_after) = path_and_leaf(coded.name), path_and_leaf(following.name)
    return (
        (path, leaf, leaf_after) == (path_after, WEIGHT, BIAS)
        and coded.codes.axis == ChannelAxis()
        and following.dtype == torch.float32
        and following.shape == coded.shape[:1]
        and following.storage == SCALED
    )


def _check_limits(tensor: PackedTensor) -> None:
    name, shape = tensor.name, tensor.shape
    if len(shape) > MOST_DIMS:
        raise ValueError(f"Expected {name!r} of at most {MOST_DIMS} dimensions, got {len(shape)}. Flatten it.")
    if entries(shape) > MOST_ENTRIES:
        raise ValueError(f"Expected {name!r} of at most 2^40 entries, got {tuple(shape)}. Drop it.")
