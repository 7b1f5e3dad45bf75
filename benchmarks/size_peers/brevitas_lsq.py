"""Learned step size quantization (Esser et al. 2020, arXiv 1902.08153) with Brevitas, its codes entropy coded."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from size_peers.codes import Coded, pack, unpack
from size_peers.method import Setting, folded
from size_peers.task import Task
from size_peers.training import Run, train, trained_float

ENDS = 8  # bits of the first and the last layer, as in the paper


def layers(net: nn.Module) -> list[str]:
    """Paths of the convolutions and linear layers."""
    return [path for path, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def with_quantizers(net: nn.Module, bits: int) -> nn.Module:
    """Brevitas' layers in place of the network's own, each channel's scale a parameter; in place."""
    qnn: Any = import_module("brevitas.nn")
    scaled: Any = import_module("brevitas.quant.scaled_int").Int8WeightPerChannelFloat
    learned: Any = import_module("brevitas.inject.enum").ScalingImplType.PARAMETER_FROM_STATS
    paths = layers(net)
    for path in paths:
        layer = net.get_submodule(path)
        quant = scaled.let(bit_width=ENDS if path in (paths[0], paths[-1]) else bits, scaling_impl_type=learned)
        known = {"bias": layer.bias is not None, "weight_quant": quant}
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            made = qnn.QuantConv2d(*sizes, stride=layer.stride, padding=layer.padding, **known)
        else:
            made = qnn.QuantLinear(layer.in_features, layer.out_features, **known)
        made.load_state_dict(layer.state_dict(), strict=False)
        start_scales(made)
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, made)
    return net


@torch.no_grad()
def start_scales(layer: Any) -> None:
    """Sets the scales of a new layer as the paper does: ``2 * mean(abs(weight)) / sqrt(largest code)``, by channel."""
    layer.quant_weight()  # lets Brevitas set them, once and for all, to the largest weight's
    value = layer.weight_quant.tensor_quant.scaling_impl.value  # scale * largest code
    largest = 2.0 ** (layer.weight_quant.bit_width().item() - 1) - 1
    value.copy_((2 * layer.weight.flatten(1).abs().mean(1) * largest**0.5).reshape(value.shape))


class BrevitasLsq:
    """Quantized weights with learned scales, trained on from the float network; activations stay in float."""

    name = "brevitas_lsq"
    needs: Sequence[str] = ("brevitas==0.13.4", "constriction==0.5.0", "zstandard==0.25.0")
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        return [{"bits": bits} for bits in (4, 3, 2)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        net = with_quantizers(trained_float(run)[0], setting["bits"])
        return train(run, f"brevitas_lsq-bits{setting['bits']}", net)

    @torch.no_grad()
    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        plain, codes = run.task.network(), dict[str, Tensor]()
        state = trained.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        for layer in layers(plain):
            quant = trained.get_submodule(layer).quant_weight()
            codes[f"{layer}.weight"] = (quant.value / quant.scale).round()
            plain.get_parameter(f"{layer}.weight").copy_(quant.value)
        net = folded(plain, run.task)
        coded = {}
        for name, weight in net.state_dict().items():
            if name in codes:  # folding scales each channel, by a negative number too
                rows, integers = weight.flatten(1), codes[name].flatten(1)
                scale = (rows * integers).sum(1) / integers.square().sum(1).clamp(min=1)
                coded[name] = Coded(codes[name].numpy().astype(np.int32), scale.half().numpy())
        path.write_bytes(pack(net, coded, original=folded(run.task.network(), run.task)))

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        return unpack(path.read_bytes(), folded(task.network(), task))
