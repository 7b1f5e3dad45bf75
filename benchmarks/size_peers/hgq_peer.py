"""HGQ2 (Sun et al. 2026): learned bits for every single weight, in Keras with torch as its backend."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from size_peers.codes import Coded, pack, unpack
from size_peers.method import Setting
from size_peers.task import Task
from size_peers.training import Run, train


class HgqNet(nn.Module):
    """LeNet-5 in HGQ2's layers. Weights and biases are quantized, activations are not.

    Args:
        net: The network whose initial weights it takes.
        penalty: Loss for each bit of each weight.
    """

    def __init__(self, net: nn.Module, penalty: float) -> None:
        super().__init__()
        os.environ["KERAS_BACKEND"] = "torch"
        keras, config, layers = (import_module(name) for name in ("keras", "hgq.config", "hgq.layers"))
        keras.config.set_image_data_format("channels_first")
        bits = import_module("hgq.regularizers").MonoL1(penalty)
        scopes = (
            config.QuantizerConfigScope(place="weight", default_q_type="kbi", br=bits, overflow_mode="SAT_SYM"),
            config.LayerConfigScope(enable_ebops=False, enable_iq=False, enable_oq=False),
        )
        with scopes[0], scopes[1]:
            self.keras: Any = keras.Sequential(
                [
                    keras.layers.Input((1, 28, 28)),
                    layers.QConv2D(20, 5, activation="relu"),
                    keras.layers.MaxPooling2D(2),
                    layers.QConv2D(50, 5, activation="relu"),
                    keras.layers.MaxPooling2D(2),
                    keras.layers.Reshape((800,)),  # Flatten would put channels last
                    layers.QDense(500, activation="relu"),
                    layers.QDense(10),
                ]
            )
        for layer, (weight, bias) in zip(self.quantized(), weights_and_biases(net), strict=True):
            layer.kernel.assign(weight.detach().permute(2, 3, 1, 0) if weight.dim() == 4 else weight.detach().T)
            layer.bias.assign(bias.detach())

    def quantized(self) -> list[Any]:
        """The layers with weights."""
        return [layer for layer in self.keras.layers if hasattr(layer, "kq")]

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.keras(images, training=self.training)
        return logits

    def penalty(self) -> Tensor:
        """The loss of all bits."""
        return torch.stack(list(self.keras.losses)).sum()


def weights_and_biases(net: nn.Module) -> list[tuple[Any, Any]]:
    """The parameters of the layers with weights, in their order."""
    return [(m.weight, m.bias) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def fixed_point(weight: Tensor, *, per_channel: bool) -> Coded:
    """Codes of fixed-point values: whole numbers of the coarsest power of two that represents a channel, or all."""
    rows = weight.flatten(1)
    fraction = torch.full((len(rows),), 24)  # binary digits after the point
    for digits in range(23, -9, -1):
        exact = ((rows * 2.0**digits).frac() == 0).all(1)
        fraction[exact if per_channel else exact.all().expand(len(rows))] = digits
    codes = rows * torch.exp2(fraction)[:, None]
    shift = torch.clamp((codes.abs().amax().clamp(min=1) / 32767).log2().ceil(), min=0)  # beyond 16 bits: rounded
    codes = (codes / torch.exp2(shift)).round().to(torch.int32)
    return Coded(codes.reshape(weight.shape).numpy(), torch.exp2(shift - fraction).half().numpy())


class Hgq:
    """HGQ2's layers in the training of all methods, with a loss for bits; the fixed-point values entropy coded."""

    name = "hgq2"
    needs: Sequence[str] = ("hgq2==0.2.0", "constriction==0.5.0", "zstandard==0.25.0")
    tasks: Sequence[str] = ("mnist",)

    def settings(self, task: str) -> list[Setting]:
        return [{"penalty": penalty} for penalty in (3e-8, 1e-7, 3e-7, 1e-6)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        net = HgqNet(run.network(), setting["penalty"])
        return train(run, f"hgq2-penalty{setting['penalty']}", net, extra_loss=net.penalty)

    @torch.no_grad()
    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        net = run.task.network()
        for layer, (weight, bias) in zip(trained.quantized(), weights_and_biases(net), strict=True):
            kernel = layer.qkernel.detach()
            weight.copy_(kernel.permute(3, 2, 0, 1) if kernel.dim() == 4 else kernel.T)
            bias.copy_(layer.qbias.detach())
        coded = [
            {name: fixed_point(t, per_channel=each) for name, t in net.state_dict().items() if t.dim() > 1}
            for each in (False, True)
        ]
        path.write_bytes(min((pack(net, codes, original=run.task.network()) for codes in coded), key=len))

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        return unpack(path.read_bytes(), task.network())
