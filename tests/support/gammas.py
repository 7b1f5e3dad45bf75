"""Functions and classes that YAML names for gamma and for the price."""

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.parameters import quantized_parameters


class Ramp:
    """gamma from 0 up to its value."""

    def __init__(self, gamma: float, steps: int) -> None:
        self.gamma, self.steps = gamma, steps

    def __call__(self, step: int) -> float:
        return self.gamma * min(1.0, step / self.steps)


def tenth(step: int) -> float:
    return 0.1 * min(1, step)


def squares(module: nn.Module) -> Tensor:
    """The mean square of the quantized weights."""
    weights = [getattr(p.layer, p.weight_name) for p in quantized_parameters(module)]
    return torch.cat([w.flatten() for w in weights]).square().mean()
