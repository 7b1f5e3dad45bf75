"""Quantized activations in an ONNX graph, in the form that runtimes compute in integers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.activations.formula import code_limits
from lightning_selfcompress.activations.layers import Activated, activated_modules, exponents_of
from lightning_selfcompress.onnx.nodes import Names, drop_unused
from lightning_selfcompress.quantize.formula import step_size

_LAYERS = ("Conv", "ConvTranspose", "Gemm")  # whose third input is a bias


_LARGEST = (1 << 31) - 1


class Quantizers:
    """The quantizers of a network's activations as QuantizeLinear and DequantizeLinear, which the exporter traces.

    Args:
        plain: The network; its step sizes are read now, since a tracer sees no numbers.
    """

    def __init__(self, plain: nn.Module) -> None:
        self._steps: dict[int, list[float]] = {}
        for _, module in activated_modules(plain):
            self._steps[id(module)] = step_size(exponents_of(module).detach().float().cpu()).tolist()

    def __call__(self, module: Activated, number: int, x: Tensor) -> Tensor:
        """Quantizes an activation. With fewer than 8 bits a Clip limits the codes, since these operators have 8.

        Args:
            module: The module that quantizes.
            number: The number of its point.
            x: The activation.
        """
        point, step = module._points[number], self._steps[id(module)][number]
        low, high = code_limits(point.bits, point.signed)
        dtype = torch.int8 if point.signed else torch.uint8
        scale, zero = torch.tensor(step), torch.zeros((), dtype=dtype)
        value = x.float() if point.bits == 8 else x.float().clamp(low * step, high * step)
        codes = torch.onnx.ops.symbolic("QuantizeLinear", (value, scale, zero), {}, dtype=dtype, shape=x.shape)
        back = torch.onnx.ops.symbolic("DequantizeLinear", (codes, scale, zero), {}, dtype=torch.float32, shape=x.shape)
        return back.to(x.dtype)


def quantize_biases(proto: Any) -> None:
    """Stores the biases of layers with integer inputs and weights as int32, in place, as integer kernels take them.

    A step of a bias is the product of the steps of the input and of the channel's weights: far below the step of the
    activation that the layer makes. A bias that int32 cannot hold in this step stays float.

    Args:
        proto: An ONNX model whose activations are quantized.
    """
    import onnx

    stored, names = {t.name: t for t in proto.graph.initializer}, Names(proto.graph)
    made = {node.output[0]: node for node in proto.graph.node}

    def scale_of(name: str) -> Any:
        """The scales of what dequantizes an input, perhaps behind a move of its entries; None if nothing does."""
        node = made.get(name)
        while node is not None and node.op_type in ("Flatten", "Reshape", "Transpose", "MaxPool"):
            node = made.get(node.input[0])
        scale = stored.get(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None
        return None if scale is None else onnx.numpy_helper.to_array(scale)

    nodes = []
    for node in proto.graph.node:
        bias = stored.get(node.input[2]) if node.op_type in _LAYERS and len(node.input) > 2 else None
        scales = [scale for name in node.input[:2] if (scale := scale_of(name)) is not None]
        if bias is not None and len(scales) == 2:
            values = onnx.numpy_helper.to_array(bias)
            scale = np.broadcast_to(scales[0].reshape(-1)[0] * scales[1].reshape(-1), values.shape).astype(np.float32)
            codes = np.round(values.astype(np.float64) / scale)
            if np.abs(codes).max(initial=0) <= _LARGEST:
                code, step, out = (names.new(f"{bias.name}_{what}") for what in ("codes", "scale", "value"))
                for name, array in ((code, codes.astype(np.int32)), (step, scale)):
                    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
                nodes.append(onnx.helper.make_node("DequantizeLinear", [code, step], [out], axis=0))
                node.input[2] = out
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    drop_unused(proto)
