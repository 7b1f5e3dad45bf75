"""Folding of the parts of an ONNX graph whose outputs are constant for all inputs.

A block whose inner layer has lost its last channel still computes zeros, and its second layer outputs its bias only.
The network's code needs these layers, but a graph does not.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_selfcompress.onnx.nodes import Names, drop_unused

_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


_POOLS = {"GlobalAveragePool", "GlobalMaxPool", "MaxPool"}  # the pool of equal values is the same value


_MOVES = {"Cast", "Expand", "Flatten", "Reshape", "Transpose"}  # the output is zeros if the input is zeros


_POINTWISE = {"Add", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish"}


_POINTWISE |= {"Mul", "Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Sub", "Tanh"}


def fold_constants(proto: Any) -> None:
    """Replaces constant tensors by initializers, in place, and removes the nodes and weights that computed them.

    A tensor is constant if a known array that broadcasts to its shape has its values for all inputs: the output of a
    layer whose weights or inputs are zeros, which is the layer's bias, or the output of pooling and pointwise operators
    on constants. An initializer replaces the constant in pointwise operators whose other input has the shape of the
    output. If the constant is added to the output of a layer and this output has no other use, the initializer becomes
    part of the layer's bias. All other constants stay.

    Args:
        proto: An ONNX model.
    """
    graph = proto.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return  # a node's inputs do not list the outer tensors that its subgraph reads
    types = _types(proto)
    found = _constants(proto, types)
    if found:
        names = Names(graph)
        stored = _store(graph, names, types, found)
        drop_unused(proto)
        _shorten(proto.graph, names, types, stored)
        drop_unused(proto)


def _store(graph: Any, names: Names, types: Mapping[str, "_Type"], found: Mapping[str, np.ndarray]) -> set[str]:
    """Stores constants as initializers for operators whose other input has the full shape; returns the new names."""
    stored: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in _POINTWISE or len(node.input) != 2 or node.output[0] in found:
            continue
        for i, name in enumerate(node.input):
            other = types.get(node.input[1 - i])
            if name in found and other is not None and other == types.get(node.output[0]):
                if name not in stored:
                    stored[name] = _add(graph, names.new(f"{name}_constant"), found[name])
                node.input[i] = stored[name]
    return set(stored.values())


def _shorten(graph: Any, names: Names, types: Mapping[str, "_Type"], constants: set[str]) -> None:
    """Moves added constants into the bias of the layer before, and removes the second of two Relu in a row."""
    kept = {value.name for value in graph.output}
    made_by = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    same: dict[str, str] = {}  # output of a removed node -> the tensor that replaces it
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
        if node.output[0] in kept:
            continue
        before, remaining = made_by.get(node.input[0]) if node.input else None, None
        if node.op_type == "Relu" and before is not None and before.op_type == "Relu":
            remaining = node.input[0]
        elif node.op_type == "Add" and constants & set(node.input):
            constant, other = sorted(node.input, key=lambda name: name not in constants)
            alone = made_by.get(other) if uses[other] == 1 and other not in kept else None
            if other in types and _absorbed(graph, names, alone, types[other], constant):
                remaining = other
        if remaining is not None:
            same[node.output[0]] = remaining
            uses[remaining] += uses[node.output[0]] - 1


def _absorbed(graph: Any, names: Names, layer: Any, output: "_Type", constant: str) -> bool:
    """Adds a constant to the bias of a layer, if possible; returns whether the addition after the layer can be removed.

    The addition of zeros can be removed without any layer.
    """
    import onnx

    wanted = {constant, *(layer.input[2:] if layer is not None else ())}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name in wanted}
    if not stored[constant].any():
        return True
    if layer is None or layer.op_type not in {"Conv", "ConvTranspose", "Gemm"}:
        return False
    bias, channels = _bias(layer, stored, output), output.shape[1]
    if bias is None or not isinstance(channels, int) or not _by_channel(stored[constant], output):
        return False
    total = np.broadcast_to(np.asarray(bias + stored[constant]).reshape(-1), channels)
    inputs = [*layer.input[:2], _add(graph, names.new(f"{layer.output[0]}_bias"), np.ascontiguousarray(total))]
    del layer.input[:]
    layer.input.extend(inputs)
    return True


@dataclass(frozen=True)
class _Type:
    """The shape of a tensor, with a name for each unknown size, and its dtype."""

    shape: tuple[int | str, ...]
    dtype: Any


def _types(proto: Any) -> dict[str, _Type]:
    """Infers the types of the tensors between nodes, except for tensors whose shape cannot be inferred."""
    import onnx

    types = {}
    for value in onnx.shape_inference.infer_shapes(proto).graph.value_info:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or (d.dim_value if d.HasField("dim_value") else "") for d in tensor.shape.dim)
        if tensor.HasField("shape") and "" not in shape:
            types[value.name] = _Type(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return types


def _constants(proto: Any, types: dict[str, _Type]) -> dict[str, np.ndarray]:
    """Finds the constant tensors between nodes; returns an array for each that broadcasts to the tensor's shape."""
    import onnx

    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    zeros = {name for name, array in stored.items() if not array.any()}
    found: dict[str, np.ndarray] = {}
    for node in proto.graph.node:
        symmetric = node.op_type == "DequantizeLinear" and len(node.input) == 2
        if (symmetric or node.op_type in _MOVES) and node.input[0] in zeros:
            zeros.add(node.output[0])
        if node.op_type in _LINEAR and node.output[0] in types:
            value = _bias(node, stored, types[node.output[0]]) if zeros & set(node.input[:2]) else None
        elif node.op_type in _POOLS and len(node.output) == 1:
            value = found.get(node.input[0])
            value = value if value is not None and _by_channel(value, types.get(node.input[0])) else None
        elif node.op_type in _POINTWISE and any(name in found for name in node.input):
            known: dict[str, Any] = {name: found.get(name, stored.get(name)) for name in node.input if name}
            value = _evaluated(proto, node, known) if all(array is not None for array in known.values()) else None
        else:
            value = None
        if value is not None:
            found[node.output[0]] = value
            zeros |= {node.output[0]} if not value.any() else set()
    return found


def _by_channel(value: np.ndarray, tensor: _Type | None) -> bool:
    """Returns whether an array that broadcasts to a tensor varies only along dimension 1, the channels."""
    if tensor is None:
        return False
    sizes = (1,) * (len(tensor.shape) - value.ndim) + value.shape
    return all(n == 1 for dim, n in enumerate(sizes) if dim != 1)


def _evaluated(proto: Any, node: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Computes a pointwise operator on arrays, within a model, because ONNX defines some operators by others."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    to_type = onnx.helper.np_dtype_to_tensor_dtype
    given = [onnx.helper.make_tensor_value_info(n, to_type(a.dtype), a.shape) for n, a in inputs.items()]
    out = onnx.helper.make_tensor_value_info(node.output[0], given[0].type.tensor_type.elem_type, None)
    graph = onnx.helper.make_graph([node], "one", given, [out])
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    return np.asarray(ReferenceEvaluator(model).run(None, inputs)[0])  # type: ignore[index]


def _bias(node: Any, stored: dict[str, np.ndarray], output: _Type) -> np.ndarray | None:
    """Returns the output of a layer whose weights or inputs are zeros, or None if its bias is not known."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros((), output.dtype)
    bias = stored.get(node.input[2])
    if bias is None or node.op_type == "Gemm":
        return bias if all(a.f == 1 for a in node.attribute if a.name == "beta") else None
    return bias.reshape(-1, *[1] * (len(output.shape) - 2))


def _add(graph: Any, name: str, value: np.ndarray) -> str:
    import onnx

    graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return name
