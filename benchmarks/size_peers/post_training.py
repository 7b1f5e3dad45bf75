"""Post-training quantization of the float network: per channel, symmetric, the codes entropy coded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from size_peers.codes import Coded, pack, unpack
from size_peers.method import Setting, folded
from size_peers.task import Task
from size_peers.training import Run, trained_float


def quantized(
    weight: Tensor,  # (out, in, *kernel)
    bits: int,
) -> Coded:
    """The weight in ``2 ** bits - 1`` levels a channel, with the scale of the least squared error of 60."""
    rows, largest = weight.detach().flatten(1), 2 ** (bits - 1) - 1
    full = rows.abs().amax(1, keepdim=True) / largest
    best, error = full.half(), torch.full((len(rows), 1), torch.inf)
    for share in torch.linspace(0.2, 1, 60):
        scale = (full * share).half()
        safe = torch.where(scale > 0, scale.float(), 1)
        found = (torch.clamp((rows / safe).round(), -largest, largest) * scale.float() - rows).square().sum(1, True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    safe = torch.where(best > 0, best.float(), 1)
    codes = torch.clamp((rows / safe).round(), -largest, largest) * (best > 0)
    return Coded(codes.reshape(weight.shape).numpy().astype(np.int32), best[:, 0].numpy())


def pack_quantized(net: nn.Module, task: Task, bits: int, path: Path) -> None:
    """Writes a network with its weights quantized after training."""
    net = folded(net, task)
    coded = {name: quantized(t, bits) for name, t in net.state_dict().items() if t.dim() > 1}
    path.write_bytes(pack(net, coded, original=folded(task.network(), task)))


class PostTraining:
    """Quantization without training."""

    name = "post_training"
    needs: Sequence[str] = ("constriction==0.5.0", "zstandard==0.25.0")
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        return [{"bits": bits} for bits in (8, 6, 4, 3)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        return trained_float(run)[0], 0.0

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        pack_quantized(trained, run.task, setting["bits"], path)

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        return unpack(path.read_bytes(), folded(task.network(), task))
