"""The batch size of an ONNX graph, which stays open if the network's code does not depend on it."""

import copy
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def grown_inputs(plain: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Repeats the last entry of each input along dimension 0, and returns the longer inputs if the network takes them.

    The exporter would trace a network with a fixed batch size without an error, and would treat a size of 1 as a
    constant.

    Args:
        plain: A module in evaluation mode.
        inputs: The arguments of its ``forward``.

    Returns:
        The longer inputs, or None if the network does not take them.
    """
    grown = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[-1:]]) if t.dim() else t, inputs)
    try:
        with torch.no_grad():
            plain(*grown)
    except Exception:  # the network's code may raise any exception
        return None
    return cast("tuple[Any, ...]", grown)


def name_batch(proto: Any) -> None:
    """Renames the size of dimension 0 from the tracer's name, such as s77, to ``batch``, in place.

    If the inputs have several such sizes, these become ``batch_0``, ``batch_1`` and so on.

    Args:
        proto: An ONNX model.
    """
    sizes = [d for v in (*proto.graph.input, *proto.graph.output) for d in v.type.tensor_type.shape.dim]
    first = [i.type.tensor_type.shape.dim[:1] for i in proto.graph.input]
    symbols = list(dict.fromkeys(d.dim_param for dims in first for d in dims if d.dim_param))
    for i, symbol in enumerate(symbols):
        name = "batch" if len(symbols) == 1 else f"batch_{i}"
        for size in sizes:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{symbol}\b", name, size.dim_param)


def fixed_inputs(proto: Any) -> list[str]:
    """Returns the names of the inputs whose dimension 0 has a fixed size.

    Args:
        proto: An ONNX model.
    """
    shapes = {i.name: i.type.tensor_type.shape.dim for i in proto.graph.input}
    return [name for name, dims in shapes.items() if len(dims) and not dims[0].dim_param]


def is_for(proto: Any, traced: Sequence[Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Returns whether a graph accepts inputs of another batch size, judged by the shapes that ONNX infers.

    The tracer writes the traced size into some operators, for example after an LSTM, although it declares the dimension
    as open.

    Args:
        proto: An ONNX model.
        traced: The inputs with which the network was traced.
        inputs: Inputs of another batch size.
        outputs: The network's outputs for ``inputs``.

    Returns:
        False if the shapes contradict an operator, or if an output has another shape than the network's output. True if
        the graph has another number of inputs or outputs, so that the shapes cannot be compared.
    """
    if len(inputs) != len(proto.graph.input) or len(outputs) != len(proto.graph.output):
        return True  # some inputs or outputs are not tensors
    strict = _output_dims(proto, traced, strict=True) is not None  # otherwise strict inference fails for other reasons
    found = _output_dims(proto, inputs, strict=strict)
    if found is None:
        return False
    return all(
        n in (None, m) for dims, t in zip(found, outputs, strict=True) for n, m in zip(dims, t.shape, strict=False)
    )


def gives(proto: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, integer: bool = False) -> bool:
    """Returns whether ONNX Runtime computes about the same outputs from some inputs as the network.

    The tracer follows only one branch if the network's code tests the batch size, and unrolls loops over the batch.

    Args:
        proto: An ONNX model.
        inputs: The inputs.
        outputs: The network's outputs for these inputs.
        integer: Whether activations are integers: one that is rounded otherwise moves outputs by its step.

    Returns:
        False if the outputs differ or the computation fails. True also if the graph cannot be tried: ONNX Runtime is
        not installed or lacks an operator, or the graph has another number of inputs or outputs.
    """
    try:
        import onnxruntime
    except ImportError:
        return True
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime lacks an operator, or lacks it for this type
        return True
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(inputs) or len(session.get_outputs()) != len(outputs):
        return True  # some inputs or outputs are not tensors
    try:
        found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    except Exception:  # the graph works for other sizes only
        return False
    within = _INTEGER if integer else _FLOAT
    return all(_about(torch.from_numpy(a), b, within) for a, b in zip(found, outputs, strict=True))


_FLOAT, _INTEGER = 0.01, 0.25  # shares of the largest output that outputs may differ by


def _about(a: Tensor, b: Tensor, within: float) -> bool:
    """Returns whether two tensors are equal within a share of the largest entry; of integers, shapes are compared.

    Rounding in the network can change integers, such as an index of a largest value.
    """
    if a.shape != b.shape or not b.is_floating_point():
        return a.shape == b.shape
    scale = max(1.0, float(b.abs().nan_to_num(0, 0, 0).max())) if b.numel() else 1.0
    return torch.allclose(a.double(), b.double(), rtol=within, atol=within * scale, equal_nan=True)


def _output_dims(proto: Any, inputs: Sequence[Tensor], *, strict: bool) -> list[list[int | None]] | None:
    """Infers the output shapes for some inputs, with None for an unknown size; None if the shapes are contradictory."""
    import onnx

    sized = copy.deepcopy(proto)
    for value, tensor in zip(sized.graph.input, inputs, strict=True):
        for dim, n in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
            dim.dim_value = n
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(sized, strict_mode=strict, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return None
    shapes = [value.type.tensor_type.shape.dim for value in inferred.graph.output]
    return [[d.dim_value if d.HasField("dim_value") else None for d in dims] for dims in shapes]
