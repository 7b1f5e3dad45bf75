"""What a method of the comparison is, and what several methods share."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lightning_selfcompress import fold_batchnorm
from size_peers.task import Task
from size_peers.training import Run

Setting = dict[str, Any]


class Method(Protocol):
    """A way to a small file.

    Attributes:
        name: The method's name in commands and results.
        needs: Packages that the method needs, as pip names them with their versions.
        tasks: The tasks that the method has settings for.
    """

    name: str
    needs: Sequence[str]
    tasks: Sequence[str]

    def settings(self, task: str) -> list[Setting]:
        """The settings to compare, the largest file first."""

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        """What :meth:`pack` takes, and the seconds of the method's own training."""

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        """Writes the file, by the best packing that the method has."""

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        """A network for evaluation, from nothing but the file and the setting."""


def folded(net: nn.Module, task: Task) -> nn.Module:
    """A copy without batch normalization, which is folded into the layers before."""
    net = copy.deepcopy(net).cpu().eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        fold_batchnorm(net, task.example.cpu())
    return net.requires_grad_(False)


@torch.no_grad()
def normalization_as_scale_and_shift(net: nn.Module) -> nn.Module:
    """Puts the statistics of batch normalization into its weight and bias, in place: two values a channel are left."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            factor = module.weight / (module.running_var + module.eps).sqrt()
            module.bias.sub_(module.running_mean * factor)
            module.weight.copy_(factor)
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    return net


def empty(task: Task) -> nn.Module:
    """The network whose every value will come from a file."""
    net = task.network().eval()
    return normalization_as_scale_and_shift(net)
