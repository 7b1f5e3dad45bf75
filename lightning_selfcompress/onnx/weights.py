"""Integer weights in the layers of a network to be traced: codes and scales that a standard operator dequantizes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.packing import Codes, Packed, PackedTensor, from_file, from_rows, to_rows
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, step_size
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.quantized_class import quantized_class
from lightning_selfcompress.tensors import name_of, stored_tensors

WIDE_OPSET = 21  # the first opset with int4 and int16 in DequantizeLinear


_BITS = (4, 8, 16)


@dataclass(frozen=True)
class _Place:
    """A parameter of a layer whose values are computed from codes."""

    path: str
    name: str
    before: Tensor
    packed: PackedTensor
    codes: str  # the names of the two buffers that replace the parameter
    scale: str


@dataclass(frozen=True)
class CodedWeights:
    """The weights that are written as codes, and the reasons why other weights are not.

    Args:
        places: The parameters of layers that are computed from codes.
        types: The type of each weight in the file, as in :class:`OnnxReport`.
        integer: Whether codes are stored as integer kernels take them: in at least 8 bits, matrices as matrices.
        bits: Name of each initializer of codes -> bits of its integer type.
        initializers: Name of each weight -> the names that its initializers may have.
        notes: The weights that stay float, each with the reason.
    """

    places: list[_Place] = field(default_factory=list)
    integer: bool = False
    types: dict[str, str] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    initializers: dict[str, set[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, plain: nn.Module, packed: Mapping[str, PackedTensor], *, opset: int, as_float: bool, integer: bool = False
    ) -> "CodedWeights":
        """Finds the weights of a network that are written as codes.

        Args:
            plain: The network with float weights, before batch normalization is folded into the weights.
            packed: The network's coded weights, by name.
            opset: Version of ONNX's operators.
            as_float: Whether all weights stay float.
            integer: Whether the file is for integer kernels.

        Returns:
            The weights, and the layers that read them.
        """
        weights = cls(integer=integer)
        by_id = {id(t): packed[name] for name, t in stored_tensors(plain, transient=False).items() if name in packed}
        for tensor in packed.values():
            bits, reason = _width(tensor, opset)
            bits = max(bits, 8) if integer else bits
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
                    width = _width(found, opset)[0]
                    weights.bits[codes] = max(width, 8) if integer else width
        return weights

    def put_into(self, plain: nn.Module) -> None:
        """Replaces weights by buffers of codes and scales, and gives the layers a class that reads these buffers.

        Args:
            plain: The network. Batch normalization may have been folded into its weights.
        """
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        names: dict[str, list[str]] = {}
        for place in self.places:
            layer, packed = plain.get_submodule(place.path), place.packed
            now = cast(Tensor, layer._parameters.pop(place.name))
            codes, scale = shared.setdefault(packed.name, (_codes(packed, integer=self.integer), _scale(packed)))
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
        """Notes the weights that a graph does not use.

        Args:
            traced: Names of the initializers in the exporter's graph.
            folded: Names of the initializers after constants were folded.
        """
        codes = {place.packed.name: _codes_of(place.packed).rows for place in self.places}
        for name, initializers in self.initializers.items():
            now = initializers & traced
            if name in codes and not now:  # the exporter stores equal initializers once
                equal = [other for other in codes if np.array_equal(codes[other], codes[name])]
                now = set().union(*(self.initializers[other] for other in equal)) & traced
            if now and not now & folded:
                self.types[name] = "constant"
            elif name in codes and not now:
                self.types[name] = "none"


def coded_weights(
    model: nn.Module, plain: nn.Module, file: str | os.PathLike[str] | None
) -> tuple[dict[str, PackedTensor], list[str]]:
    """Returns the weights of a model whose codes are known.

    Args:
        model: A module.
        plain: The same module with float weights.
        file: The packed file from which ``model`` has its weights. None takes the codes of ``model`` itself, which has
            codes if it is converted.

    Returns:
        The weights by name, and a note on the weights whose values differ from the values in the file.

    Raises:
        PackedFileError: If the file is damaged.
        ValueError: If the file holds none of the network's weights as codes.
        OSError: If the file cannot be read.
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
    """Returns a name that no attribute of the layer has: the given name, with underscores appended if needed."""
    while hasattr(layer, name):
        name += "_"
    return name


def _codes_of(tensor: PackedTensor) -> Codes:
    assert tensor.codes is not None
    return tensor.codes


def _width(tensor: PackedTensor, opset: int) -> tuple[int, str]:
    """Returns the bits of the integer type that holds all codes, or 0 and the reason why there is none."""
    codes = _codes_of(tensor).living
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    fitting = [n for n in _BITS if -(1 << (n - 1)) <= low and high < 1 << (n - 1) and (n == 8 or opset >= WIDE_OPSET)]
    if tensor.dtype == torch.float64:
        return 0, "DequantizeLinear has no float64"
    if not fitting:
        return 0, f"its codes go from {low} to {high}, and opset {opset} has no integers of that width to dequantize"
    return fitting[0], ""


def _codes(packed: PackedTensor, *, integer: bool = False) -> Tensor:
    """Returns the codes in the shape of the weight, or in a row per channel if channels lie along two dimensions.

    A matrix of codes gets one more dimension of size 1, because ONNX Runtime would compute a layer with a dequantized
    matrix in int8, and would round the layer's input; where that is wanted, it does not.
    """
    of = _codes_of(packed)
    bits, _ = _width(packed, WIDE_OPSET)
    rows = torch.from_numpy(of.rows.astype(np.int8 if bits <= 8 else np.int16))  # int8 also for codes down to -128
    codes = rows if of.axis.groups > 1 else from_rows(rows, of.axis, packed.shape)
    return codes.unsqueeze(-1) if codes.dim() == 2 and not integer else codes


def _scale(packed: PackedTensor) -> Tensor:
    return step_size(torch.from_numpy(_codes_of(packed).exponents).float() / EXPONENT_STEPS)


def _factor(before: Tensor, after: Tensor, packed: PackedTensor) -> Tensor:
    """Returns the factor by which batch normalization multiplied each channel, from the channel's largest weight."""
    one, other = (to_rows(t.detach().float(), _codes_of(packed).axis) for t in (before, after))
    largest = one.abs().argmax(1, keepdim=True)
    one, other = (t.gather(1, largest).squeeze(1) for t in (one, other))
    return torch.where(one == 0, 1.0, other / one)


def read_codes(layer: Quantized, name: str) -> Tensor:
    """Returns the weight of a layer with codes; the exporter traces it as a DequantizeLinear of codes and scales.

    Args:
        layer: The layer.
        name: Name of the weight in the layer.

    Returns:
        A float tensor of the weight's shape and dtype.
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
    """Stores codes of 4 bits in the type int4, two codes per byte, in place.

    Args:
        proto: An ONNX model.
        bits: Name of each initializer of codes -> bits of its integer type.
    """
    import onnx

    for tensor in proto.graph.initializer:
        if bits.get(tensor.name) == 4:
            values = onnx.numpy_helper.to_array(tensor)
            halves = np.zeros(-(-values.size // 2) * 2, np.uint8)  # the first code is the lower half of a byte
            halves[: values.size] = values.reshape(-1).astype(np.uint8) & 0xF
            packed = (halves[::2] | halves[1::2] << 4).tobytes()  # a list would take one more byte for each from 128 on
            four = onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT4, values.shape, packed, raw=True)
            tensor.CopyFrom(four)
