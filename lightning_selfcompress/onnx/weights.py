"""Integer weights in the layers of a network that is to be traced: codes and scales, read by a standard operator."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.packing import Codes, Packed, PackedTensor, from_file, from_rows, to_rows
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, step_size
from lightning_selfcompress.quantize.layers import Quantized, quantized_class
from lightning_selfcompress.tensors import name_of, stored_tensors

WIDE_OPSET = 21  # the first with int4 and int16 in DequantizeLinear


_BITS = (4, 8, 16)


@dataclass(frozen=True)
class _Place:
    """A parameter of a layer that is to be read from codes."""

    path: str
    name: str
    before: Tensor
    packed: PackedTensor
    codes: str  # names of the buffers that take its place
    scale: str


@dataclass(frozen=True)
class CodedWeights:
    """The weights that are written as codes, and why others are not.

    Args:
        places: Where layers read these.
        types: As in :class:`OnnxReport`.
        bits: Of the integer type of each initializer that is codes, by its name.
        initializers: Names that a weight's initializers may have, by its own.
        notes: Which weights stay float, and why.
    """

    places: list[_Place] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    initializers: dict[str, set[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, plain: nn.Module, packed: Mapping[str, PackedTensor], *, opset: int, as_float: bool) -> "CodedWeights":
        """Finds the weights of a network that are written as codes.

        Args:
            plain: The network with float weights, before anything is folded into these.
            packed: Its weights' codes, by name.
            opset: Version of ONNX's operators.
            as_float: Whether all stay float.

        Returns:
            The weights, and the layers that read them.
        """
        weights = cls()
        by_id = {id(t): packed[name] for name, t in stored_tensors(plain, transient=False).items() if name in packed}
        for tensor in packed.values():
            bits, reason = _width(tensor, opset)
            weights.types[tensor.name] = "float" if reason or as_float else f"int{bits}"
            if reason and not as_float:
                weights.notes.append(f"{tensor.name} stays float: {reason}.")
        for path, layer in plain.named_modules():
            for name, parameter in layer._parameters.items():
                found = by_id.get(id(parameter))
                if found is None:
                    continue
                buffers = [_unused(layer, f"{name}_{what}") for what in ("codes", "scale")]
                written, codes = (name_of(path, n) for n in (name, buffers[0]))
                weights.initializers.setdefault(found.name, set()).update((written, codes))
                if weights.types[found.name] != "float":
                    weights.places.append(_Place(path, name, cast(Tensor, parameter), found, *buffers))
                    weights.bits[codes] = _width(found, opset)[0]
        return weights

    def put_into(self, plain: nn.Module) -> None:
        """Gives layers codes and scales as buffers in place of their weights, and a class that reads these buffers.

        Args:
            plain: The network, in whose weights batch normalization may have been folded.
        """
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        names: dict[str, list[str]] = {}
        for place in self.places:
            layer, packed = plain.get_submodule(place.path), place.packed
            now = cast(Tensor, layer._parameters.pop(place.name))
            codes, scale = shared.setdefault(packed.name, (_codes(packed), _scale(packed)))
            if not torch.equal(now, place.before):
                scale = scale * _factor(place.before, now, packed)
            layer.register_buffer(place.codes, codes)
            layer.register_buffer(place.scale, scale)
            layer.__dict__.setdefault("_onnx_places", {})[place.name] = place
            names.setdefault(place.path, []).append(place.name)
        for path, own in names.items():
            layer = plain.get_submodule(path)
            layer.__dict__ |= {"_quantized": {}, "_quantized_values": {}}
            layer.__class__ = quantized_class(type(layer), tuple(own))

    def note_gone(self, traced: set[str], folded: set[str]) -> None:
        """Notes which weights a graph does without.

        Args:
            traced: Names of its initializers as the exporter made it.
            folded: The same once constants are folded.
        """
        codes = {place.packed.name: _codes_of(place.packed).rows for place in self.places}
        for name, initializers in self.initializers.items():
            now = initializers & traced
            if name in codes and not now:  # the exporter stores equal ones once
                equal = [other for other in codes if np.array_equal(codes[other], codes[name])]
                now = set().union(*(self.initializers[other] for other in equal)) & traced
            if now and not now & folded:
                self.types[name] = "constant"
            elif name in codes and not now:
                self.types[name] = "none"


def coded_weights(
    model: nn.Module, plain: nn.Module, file: str | os.PathLike[str] | None
) -> tuple[dict[str, PackedTensor], list[str]]:
    """The weights of a model whose codes are known.

    Args:
        model: A module.
        plain: The same with float weights.
        file: A packed file that ``model`` has got its weights from; None takes its own codes, if it is converted.

    Returns:
        The weights by name, and a note on the weights whose values differ from the file's.

    Raises:
        PackedFileError: If the file is damaged.
        ValueError: If it holds none of the network's weights.
        OSError: If it cannot be read.
    """
    if file is None:
        return {t.name: t for t in Packed.of(model).coded}, []
    own = stored_tensors(plain, transient=False)
    stored = {t.name: t for t in from_file(file).coded if t.name in own}
    if not stored:
        raise ValueError(
            f"Expected a packed file of this {type(model).__name__}, found none of its weights in {os.fspath(file)}."
        )
    other = [name for name, t in stored.items() if t.dtype != own[name].dtype or not torch.equal(t.tensor(), own[name])]
    notes = [f"{', '.join(other)}: float, as {os.fspath(file)} has other values."] if other else []
    return {name: t for name, t in stored.items() if name not in other}, notes


def _unused(layer: nn.Module, name: str) -> str:
    """A name that the layer has no attribute of."""
    while hasattr(layer, name):
        name += "_"
    return name


def _codes_of(tensor: PackedTensor) -> Codes:
    assert tensor.codes is not None
    return tensor.codes


def _width(tensor: PackedTensor, opset: int) -> tuple[int, str]:
    """Bits of the integer type that holds all codes, or why there is none."""
    codes = _codes_of(tensor).living
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    fitting = [n for n in _BITS if -(1 << (n - 1)) <= low and high < 1 << (n - 1) and (n == 8 or opset >= WIDE_OPSET)]
    if tensor.dtype == torch.float64:
        return 0, "DequantizeLinear has no float64"
    if not fitting:
        return 0, f"its codes go from {low} to {high}, and opset {opset} has no integers of that width to dequantize"
    return fitting[0], ""


def _codes(packed: PackedTensor) -> Tensor:
    """The codes where the weights lie; in rows, if the channels lie along two dimensions.

    Matrices get one dimension more: ONNX Runtime takes dequantized matrices for an invitation to compute in int8, and
    to round what a layer is given.
    """
    of = _codes_of(packed)
    bits, _ = _width(packed, WIDE_OPSET)
    rows = torch.from_numpy(of.rows.astype(np.int8 if bits <= 8 else np.int16))  # int8 where -128 is the lowest, too
    codes = rows if of.axis.groups > 1 else from_rows(rows, of.axis, packed.shape)
    return codes.unsqueeze(-1) if codes.dim() == 2 else codes


def _scale(packed: PackedTensor) -> Tensor:
    return step_size(torch.from_numpy(_codes_of(packed).exponents).float() / EXPONENT_STEPS)


def _factor(before: Tensor, after: Tensor, packed: PackedTensor) -> Tensor:
    """The factor by which batch normalization has multiplied each channel, read off the channel's largest weight."""
    one, other = (to_rows(t.detach().float(), _codes_of(packed).axis) for t in (before, after))
    largest = one.abs().argmax(1, keepdim=True)
    one, other = (t.gather(1, largest).squeeze(1) for t in (one, other))
    return torch.where(one == 0, 1.0, other / one)


def read_codes(layer: Quantized, name: str) -> Tensor:
    """The weight of a layer with codes, as the exporter traces it: codes and scales behind a DequantizeLinear.

    Args:
        layer: The layer.
        name: Which of its parameters.

    Returns:
        Float tensor of the weight's shape and type.
    """
    place = cast("dict[str, _Place]", layer.__dict__["_onnx_places"])[name]
    packed, codes, scale = place.packed, layer.get_buffer(place.codes), layer.get_buffer(place.scale)
    axis = _codes_of(packed).axis
    along = 0 if axis.groups > 1 else axis.dim
    value = torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale), {"axis": along}, dtype=torch.float32, shape=codes.shape
    )
    if axis.groups > 1:
        value = from_rows(value.flatten(1), axis, packed.shape)
    return value.reshape(packed.shape).to(packed.dtype)


def store_narrow(proto: Any, bits: Mapping[str, int]) -> None:
    """Stores int4 codes as such, two in a byte, in place.

    Args:
        proto: An ONNX model.
        bits: What initializers need, by name.
    """
    import onnx

    for tensor in proto.graph.initializer:
        if bits.get(tensor.name) == 4:
            values = onnx.numpy_helper.to_array(tensor)
            halves = np.zeros(-(-values.size // 2) * 2, np.uint8)  # the first is the lower half of a byte
            halves[: values.size] = values.reshape(-1).astype(np.uint8) & 0xF
            packed = (halves[::2] | halves[1::2] << 4).tobytes()  # make_tensor's own lists take a byte more from 128 on
            four = onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT4, values.shape, packed, raw=True)
            tensor.CopyFrom(four)
