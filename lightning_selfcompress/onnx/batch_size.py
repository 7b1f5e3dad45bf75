"""The batch of an ONNX graph: a size that is not fixed, as far as the network's code leaves it open."""

import copy
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def grown_inputs(plain: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs with their last entries once more, if the network takes them.

    A network that does not would be traced without complaint; and a size of 1 would be taken for a constant.

    Args:
        plain: A module in evaluation mode.
        inputs: What its ``forward`` takes.

    Returns:
        The longer inputs, or None.
    """
    grown = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[-1:]]) if t.dim() else t, inputs)
    try:
        with torch.no_grad():
            plain(*grown)
    except Exception:  # whatever the network's code raises
        return None
    return cast("tuple[Any, ...]", grown)


def name_batch(proto: Any) -> None:
    """Calls the size of dimension 0 ``batch``, in place, which the tracer has given names like s77.

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
    """The inputs whose dimension 0 has one size only.

    Args:
        proto: An ONNX model.

    Returns:
        Their names.
    """
    shapes = {i.name: i.type.tensor_type.shape.dim for i in proto.graph.input}
    return [name for name, dims in shapes.items() if len(dims) and not dims[0].dim_param]


def is_for(proto: Any, traced: Sequence[Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether a graph makes of some inputs what the network makes of them, as far as shapes tell.

    The tracer writes sizes that it has seen into some operators, those behind an LSTM for one, and calls them any size.

    Args:
        proto: An ONNX model.
        traced: The inputs that it was traced with.
        inputs: Others, of another size.
        outputs: The network's outputs for these inputs.

    Returns:
        False if an operator does not take them, or an output has another shape.
    """
    if len(inputs) != len(proto.graph.input) or len(outputs) != len(proto.graph.output):
        return True  # some are no tensors
    strict = _output_dims(proto, traced, strict=True) is not None  # else the inference has other faults to find
    found = _output_dims(proto, inputs, strict=strict)
    if found is None:
        return False
    return all(
        n in (None, m) for dims, t in zip(found, outputs, strict=True) for n, m in zip(dims, t.shape, strict=False)
    )


def gives(proto: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether ONNX Runtime, if it is installed, makes of some inputs about what the network makes of them.

    The tracer follows one branch where the network's code asks for the size of the batch, and unrolls loops over it.

    Args:
        proto: An ONNX model.
        inputs: Some inputs.
        outputs: The network's outputs for these inputs.

    Returns:
        False if it is something else; True also where ONNX Runtime has no such operator.
    """
    try:
        import onnxruntime
    except ImportError:
        return True
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception:  # it has no such operator, or not for this type
        return True
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(inputs) or len(session.get_outputs()) != len(outputs):
        return True  # some are no tensors
    try:
        found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    except Exception:  # for other sizes than these
        return False
    return all(_about(torch.from_numpy(a), b) for a, b in zip(found, outputs, strict=True))


def _about(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor is another but for rounding; of whole numbers, which may go by it, only the shape."""
    if a.shape != b.shape or not b.is_floating_point():
        return a.shape == b.shape
    scale = max(1.0, float(b.abs().nan_to_num(0, 0, 0).max())) if b.numel() else 1.0
    return torch.allclose(a.double(), b.double(), rtol=0.01, atol=0.01 * scale, equal_nan=True)


def _output_dims(proto: Any, inputs: Sequence[Tensor], *, strict: bool) -> list[list[int | None]] | None:
    """Sizes of all outputs for some inputs, None where they cannot be told; None in all if there is a contradiction."""
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
