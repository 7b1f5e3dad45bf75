"""Killing channels by hand, and what their removal changes: nothing."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.tensors import stored_tensors, tensors_in


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives vectors (biases, scales, shifts) and running statistics values that a trained network might have.

    Args:
        model: A converted module.
    """
    own = {id(p) for q in quantized_parameters(model) for p in (q.latent, *q.learned)}
    for p in model.parameters():
        if id(p) not in own and p.is_floating_point() and sum(n > 1 for n in p.shape) == 1:
            p.add_(0.3 * torch.randn_like(p))
    for buffer in model.buffers():
        if id(buffer) not in own and buffer.is_floating_point() and buffer.dim() == 1:
            buffer.uniform_(0.5, 1.5)


@torch.no_grad()
def kill(model: nn.Module, channels: Channels, chosen: NDArray[np.bool_]) -> None:
    """Brings the depths of channels to zero, and their constants too.

    Args:
        model: The module.
        channels: Its channels.
        chosen: Whether to kill each of them, ``(channels.count,)``.
    """
    tensors = stored_tensors(model)
    for slot in channels.slots:
        if slot.produces or (slot.fades and slot.size > 1):
            tensors[slot.name].view(-1)[torch.from_numpy(chosen[channels.group[slot.atoms]])] = 0
    for module in model.modules():
        if isinstance(module, Quantized):
            module.forget_quantized()


def converted(model: nn.Module) -> nn.Module:
    """The module in float64, converted in place."""
    convert(model.double())
    return model


def watched(model: nn.Module, *inputs: Any, step: Callable[[], Any] | None = None) -> tuple[Channels, Watcher]:
    """What one forward in training mode, or one step of your own, says of the channels."""
    watcher = Watcher(model.train())
    with watcher:
        if step is None:
            model(*inputs)
        else:
            step()
    return watcher.channels(), watcher


def half_removed(model: nn.Module, channels: Channels, seed: int = 0) -> tuple[nn.Module, RemovalPlan]:
    """Kills a random half of the removable channels, and removes them from a copy.

    Returns:
        The copy and the plan.
    """
    randomize(model)
    half = np.random.default_rng(seed).random(channels.count) < 0.5
    kill(model, channels, channels.removable() & half)
    plan = plan_removal(model, channels)
    smaller = copy.deepcopy(model)
    remove(smaller, plan.edits)
    return smaller, plan


def difference(model: nn.Module, smaller: nn.Module, *inputs: Any) -> float:
    """The largest difference of outputs, in training and in evaluation mode, relative to the largest output.

    Copies are run, in which nothing is dropped out, since fewer channels draw other random numbers.
    """
    worst = 0.0
    for mode in (True, False):
        results = [_outputs(net, inputs, mode) for net in (model, smaller)]
        for one, other in zip(*results, strict=True):
            assert one.shape == other.shape
            if one.numel() and not torch.equal(one, other):
                scale = one.double().abs().max().clamp_min(1e-300)
                worst = max(
                    worst, ((one.double() - other.double()).abs().max() / scale).nan_to_num(float("inf")).item()
                )
    return worst


def _outputs(net: nn.Module, inputs: tuple[Any, ...], mode: bool) -> list[Tensor]:
    net = copy.deepcopy(net).train(mode)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    torch.manual_seed(1)
    return [t.detach() for t in tensors_in(net(*inputs))]


def removable_of(channels: Channels, name: str) -> int:
    """How many channels of a layer may go."""
    own = channels.of(f"{name}.bit_depth", 0)
    return len(np.unique(own[channels.removable()[own]]))


def reason(channels: Channels, name: str) -> str:
    """Why the first channel of a layer has to stay."""
    return channels.pinned.get(int(channels.of(f"{name}.bit_depth", 0)[0]), "")


def assert_exact(net: nn.Module, channels: Channels, *inputs) -> None:
    smaller, plan = half_removed(net, channels)
    assert plan
    assert difference(net, smaller, *inputs) < 1e-10
