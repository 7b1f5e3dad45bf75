"""How every method of a comparison trains: optimizer, schedule, batches and augmentation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """A training.

    Args:
        optimizer: ``adam``, or ``sgd`` with Nesterov's momentum of 0.9.
        lr: Highest learning rate. It rises over the first twentieth of the steps and falls to zero on a cosine.
        batch_size: Images per training batch.
        shift: Largest random shift of a training image, in pixels.
        mirror: Whether half of the training images are mirrored.
        weight_decay: That of the optimizer.
        channels_last: Whether images and weights lie channels last in memory, which convolutions on CPUs prefer.
        bfloat16: Whether a training step computes in mixed bfloat16; accuracy is always measured in float32.
    """

    optimizer: str
    lr: float
    batch_size: int
    shift: int = 0
    mirror: bool = False
    weight_decay: float = 0.0
    channels_last: bool = False
    bfloat16: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a training step."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of every method."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True)

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule of every method, stepped after each step of the optimizer."""
        rising = max(1, round(WARM_UP * steps))

        def share(step: int) -> float:
            falling = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
            return (step + 1) / rising if step < rising else falling

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults of this class, to tell runs apart."""
        return {name: value for name, value in vars(self).items() if value != getattr(type(self), name, None)}


RECIPES = {
    "mnist": Recipe("adam", 4e-3, 128),
    "cifar": Recipe("sgd", 0.1, 128, shift=4, mirror=True, weight_decay=5e-4, channels_last=True, bfloat16=True),
}
