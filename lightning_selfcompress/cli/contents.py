"""The contents of a packed file or a checkpoint, which are read without the network's class."""

import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.errors import CheckpointError, PackedFileError
from lightning_selfcompress.files.checkpoint import MARK, read_checkpoint
from lightning_selfcompress.files.modest import check_regular
from lightning_selfcompress.packing import (
    MAGIC,
    VERSION,
    Packed,
    PackedSize,
    PackedTensor,
    as_bytes,
    as_codes,
    as_it_is,
    from_bytes,
    packed_size,
    stored_dtype,
)
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.formula import bit_depth, integer_bits
from lightning_selfcompress.quantize.layers import axis_key, saved_axis
from lightning_selfcompress.quantize.parameters import learned_names, quantized_parameters, weight_name_of


@dataclass(frozen=True)
class LayerRow:
    """One compressed weight of a file. A value is None if the file does not determine it.

    Args:
        name: Path of the weight's layer.
        shape: Shape of the weight.
        channels: Number of channels with a code that is not 0.
        channels_stored: Number of all stored channels.
        weights: Number of stored weights.
        learned_bits: Learned bits per stored weight, which only checkpoints hold.
        bits: Bits per stored weight as integer codes, with one width per channel.
        max_bits: Whole bits per code of the widest channel.
        nbytes: Bytes of the weight's codes and scales in a packed file, rounded.
        note: A remark on the weight; usually empty.
    """

    name: str
    shape: tuple[int, ...]
    channels: int | None
    channels_stored: int | None
    weights: int
    learned_bits: float | None
    bits: float | None
    max_bits: int | None
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class PlainRow:
    """One tensor of a file that is stored unchanged.

    Args:
        name: Name of the tensor.
        shape: Shape of the tensor.
        dtype: Dtype in the network.
        stored_as: Dtype in a packed file.
        nbytes: Bytes in a packed file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored_as: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a file.

    Args:
        path: The file.
        kind: ``"packed"`` or ``"checkpoint"``.
        nbytes: Bytes of the file.
        facts: The values in the head of the file: ``format_version`` of a packed file; ``lightning_version``, ``epoch``
            and ``global_step`` of a checkpoint.
        packed: The stored content in the form of a packed file.
        whole_network: Whether ``packed`` is complete. A checkpoint that is read without its class lacks the groups of
            convolutions.
        depths: Name of each compressed weight of a checkpoint -> the learned bit depths of its channels.
        notes: Name of a compressed weight -> why its codes are not known, or not known for certain.
    """

    path: str
    kind: str
    nbytes: int
    facts: Mapping[str, int | str | None]
    packed: Packed
    whole_network: bool = True
    depths: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def size(self) -> PackedSize:
        """The size of the packed file by its parts."""
        return packed_size(self.packed)

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """The compressed weights."""
        return tuple(self._layer(t) for t in self.packed.tensors if t.codes is not None or t.name in self.notes)

    @property
    def plain(self) -> tuple[PlainRow, ...]:
        """The tensors that are stored unchanged."""
        return tuple(
            PlainRow(t.name, t.shape, type_name(t.dtype), type_name(stored_dtype(t)), self.size.values[t.name])
            for t in self.packed.tensors
            if t.codes is None and t.name not in self.notes
        )

    @property
    def histogram(self) -> Counter[int]:
        """The number of channels by the whole bits that each of their codes needs."""
        return Counter(int(n) for t in self.packed.coded for n in channel_bits(t))

    def _layer(self, tensor: PackedTensor) -> LayerRow:
        name, note = tensor.name.removesuffix(".weight"), self.notes.get(tensor.name, "")
        weights = int(np.prod(tensor.shape))
        if tensor.codes is None:
            nbytes = self.size.values[tensor.name]
            return LayerRow(name, tensor.shape, None, None, weights, None, None, None, nbytes, note)
        bits = channel_bits(tensor)
        depths = self.depths.get(tensor.name)
        return LayerRow(
            name,
            tensor.shape,
            int((bits > 0).sum()),
            len(bits),
            weights,
            float(depths.double().mean()) if depths is not None and len(depths) and depths.isfinite().all() else None,
            float(bits.double().mean()) if len(bits) else 0.0,
            int(bits.max()) if len(bits) else 0,
            self.size.codes[tensor.name] + self.size.channels[tensor.name],
            note,
        )


def channel_bits(tensor: PackedTensor) -> Tensor:
    """Returns the whole bits that each code of a channel needs, ``(channels,)``, int64."""
    assert tensor.codes is not None
    codes, alive = tensor.codes.living, tensor.codes.alive
    low, high = codes.min(1).astype(np.int64), codes.max(1).astype(np.int64)
    bits = torch.zeros(len(alive), dtype=torch.int64)
    bits[torch.from_numpy(alive)] = integer_bits(torch.from_numpy(low), torch.from_numpy(high))
    return bits


def read_contents(path: str | os.PathLike[str], *, trusted: bool = False) -> Contents:
    """Reads a packed file or a Lightning checkpoint.

    Args:
        path: The file.
        trusted: Whether any Python object in a checkpoint may be unpickled, which runs code that the file holds.

    Returns:
        The contents of the file.

    Raises:
        PackedFileError: If the file is a damaged packed file, or neither a packed file nor a checkpoint.
        CheckpointError: If the file is a damaged checkpoint, or holds Python objects and is not trusted.
        OSError: If the file cannot be read.
    """
    name = os.fspath(path)
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    if start == MAGIC:
        data = Path(path).read_bytes()
        try:
            return Contents(name, "packed", len(data), {"format_version": VERSION}, from_bytes(data))
        except PackedFileError as error:
            raise PackedFileError(f"{name}: {error}") from error
    if not (zipfile.is_zipfile(path) or start[:2] in (b"PK", b"\x80\x02")):
        raise PackedFileError(
            f"Expected a packed file or a Lightning checkpoint in {name!r}, found a file of another kind, or an empty "
            f"one. Packed files are what export() writes; they begin with {MAGIC!r}."
        )
    return _of_checkpoint(name, _load(name, trusted=trusted))


def with_network(contents: Contents, model: nn.Module) -> Contents:
    """Returns the contents of a checkpoint, completed by its network: the channel axes and the groups of convolutions.

    Args:
        contents: The contents that :func:`read_contents` returned.
        model: The network of the checkpoint, with the values of the checkpoint.
    """
    depths = {p.name: bit_depth(p.raw_depth.detach()) for p in quantized_parameters(model)}
    return replace(contents, packed=Packed.of(model), whole_network=True, depths=depths, notes={})


def channel_axes(shape: tuple[int, ...], channels: int, *, rows: bool = False) -> list[ChannelAxis]:
    """Returns the possible channel axes of a weight, the likeliest first; empty if the number of channels fits no axis.

    Args:
        shape: Shape of the weight.
        channels: Number of its channels.
        rows: Whether the channels of its layer are known to lie along dimension 0, if their number fits there.
    """
    found = [ChannelAxis()] if shape and shape[0] == channels else []
    if len(shape) > 1 and shape[1] and channels % shape[1] == 0 and not (rows and found):
        groups = channels // shape[1]
        transposed = len(shape) > 2 and groups and shape[0] % groups == 0
        # if each group has one input and one output channel, both axes mean the same rows
        if groups == 1 or (transposed and not (found and groups == channels)):
            found.append(ChannelAxis(1, groups))
    return found


def _of_checkpoint(path: str, checkpoint: Mapping[str, Any]) -> Contents:
    saved = {k: v for k, v in _each_once(checkpoint["state_dict"]).items() if not k.startswith(MARK)}
    names = {weight: learned_names(weight) for weight in map(weight_name_of, saved) if weight in saved}
    names = {weight: pair for weight, pair in names.items() if all(name in saved for name in pair)}
    of_weight = {weight: (saved[depth], saved[exponent]) for weight, (depth, exponent) in names.items()}
    told = {weight: saved_axis(saved[key]) for weight, (depth, _) in names.items() if (key := axis_key(depth)) in saved}
    not_shown = {name for pair in names.values() for name in (*pair, axis_key(pair[0]))}
    tensors, depths, notes = [], {}, {}
    for name, tensor in saved.items():
        if name in of_weight:
            raw_depth, exponent = of_weight[name]
            # the weights of recurrent and attention layers have names of their own; an embedding has no bias
            rows = not name.endswith("weight") or (tensor.dim() == 2 and f"{name.removesuffix('weight')}bias" in saved)
            fit = raw_depth.shape == exponent.shape
            axes = channel_axes(tuple(tensor.shape), raw_depth.numel(), rows=rows) if fit else []
            axis = told.get(name)
            if axis is not None and fit and axis.fits(tensor):
                axes = [axis] if axis.channels(tensor) == raw_depth.numel() else []
            if axes and tensor.numel():
                tensors.append(as_codes(name, tensor, axes[0], raw_depth, exponent))
                depths[name] = bit_depth(raw_depth)
            else:
                tensors.append(as_it_is(name, tensor))
                if not axes:
                    counts = f"{raw_depth.numel()} bit depths and {exponent.numel()} exponents"
                    notes[name] = f"codes not known, {counts} do not fit the shape; counted as it is"
            if not all(bool(t.isfinite().all()) for t in (tensor, raw_depth, exponent)):
                notes[name] = "holds NaN or infinity, counted as code 0"
            elif len(axes) > 1:
                notes[name] = f"channels taken along dimension {axes[0].dim}; shapes do not tell, --model does"
        elif name not in not_shown:
            tensors.append(as_it_is(name, as_bytes(tensor)))
    nbytes = Path(path).stat().st_size
    packed = Packed(tuple(tensors), {})
    return Contents(path, "checkpoint", nbytes, _facts(checkpoint), packed, False, depths, notes)


def _each_once(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict; a tied tensor appears once, under the first of its names."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            continue
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in seen or not tensor.numel():
            found[name] = tensor.detach()
        seen.add(place)
    return found


def _facts(checkpoint: Mapping[str, Any]) -> dict[str, int | str | None]:
    facts = {key: checkpoint.get(key) for key in ("epoch", "global_step")}
    facts = {"lightning_version": checkpoint.get("pytorch-lightning_version"), **facts}
    plain = {key: value for key, value in facts.items() if value is None or type(value) in (int, str)}
    return {key: plain.get(key, repr(value)[:100]) for key, value in facts.items()}


def _load(path: str, *, trusted: bool) -> dict[str, Any]:
    try:
        return read_checkpoint(path, weights_only=not trusted)
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError) and "Unsupported" in str(cause):
            raise CheckpointError(
                f"Expected only tensors and plain values in {path!r}, found objects that take code to make. Add "
                f"--trust if you know where the file comes from."
            ) from error
        raise


def type_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype, for example ``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
