"""Torch-Pruning (Fang et al. 2023, arXiv 2301.12900): channels removed by importance, trained on, then quantized."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from size_peers.codes import unpack
from size_peers.method import Setting, folded
from size_peers.post_training import pack_quantized
from size_peers.task import Task, batches
from size_peers.training import Run, train, trained_float

BATCHES = 20  # whose gradients tell the importance


def pruned(net: nn.Module, run: Run, ratio: float) -> nn.Module:
    """The network without a share of its channels, those of the smallest Taylor importance of all layers; in place."""
    tp: Any = import_module("torch_pruning")
    net.train()
    for step, (images, labels) in enumerate(batches(run.task, run.seed, epoch=run.epochs)):
        if step == BATCHES:
            break
        nn.functional.cross_entropy(net(images.cpu()), labels.cpu()).backward()
    net.eval()
    outputs = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    tp.pruner.BasePruner(
        net,
        run.task.example.cpu(),
        importance=tp.importance.TaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.97,
        ignored_layers=[outputs],
    ).step()
    net.zero_grad()
    return net


class TorchPruning:
    """Structured pruning in one step from the float network, the same epochs of training again, and 8 or 6 bits."""

    name = "torch_pruning"
    needs: Sequence[str] = ("torch-pruning==1.6.1", "constriction==0.5.0", "zstandard==0.25.0")
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        ratios = (0.5, 0.7, 0.8, 0.9) if task == "mnist" else (0.3, 0.5, 0.7)
        return [{"ratio": ratio, "bits": bits} for ratio in ratios for bits in (8, 6)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        net = pruned(trained_float(run)[0], run, setting["ratio"])
        return train(run, f"torch_pruning-ratio{setting['ratio']}", net)

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        pack_quantized(trained, run.task, setting["bits"], path)

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        return unpack(path.read_bytes(), folded(task.network(), task))
