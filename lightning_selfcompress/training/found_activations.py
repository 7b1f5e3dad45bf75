"""Activations that are quantized while a Trainer trains: where, as the first training step shows on a copy."""

from typing import Any

import torch
from torch import nn

from lightning_selfcompress.activations.calibrate import Points, points_of
from lightning_selfcompress.activations.layers import activated_modules, exponents_of, put_points
from lightning_selfcompress.activations.places import find_points, layers_left
from lightning_selfcompress.tensors import copy_module
from lightning_selfcompress.training.lightning_private import averaged_models
from lightning_selfcompress.training.messages import tell, warn
from lightning_selfcompress.training.sandbox import CapturedStep, Sandbox
from lightning_selfcompress.training.strategies import keep_depths_from_ddp, shards_parameters
from lightning_selfcompress.training.watched_steps import step_arguments


def quantize_activations(trainer: Any, module: nn.Module, batch: Any, batch_idx: int, *, bits: int) -> bool:
    """Has a module quantize its activations from the next training step on, where that step needs it.

    Exponents start from the ranges of that step. Averaged copies of the module quantize alike.

    Args:
        trainer: The Trainer.
        module: The converted LightningModule.
        batch: The batch of the step.
        batch_idx: Its number.
        bits: Bit depth of all activations.

    Returns:
        Whether any are quantized.
    """
    points = _points(trainer, module, batch, batch_idx, bits) if trainer.is_global_zero else {}
    points = trainer.strategy.broadcast(points)
    if not points:
        return False
    for network in (module, *averaged_models(trainer.callbacks)):
        put_points(network, points)
    let_activations_train(module)
    keep_depths_from_ddp(trainer.strategy, module)
    torch.compiler.reset()  # graphs of the network without quantizers
    count = sum(len(own) for own in points.values())
    left = layers_left(module)
    why = f" In float stays what these read, which have a forward of their own: {', '.join(left)}." if left else ""
    tell(f"SelfCompression quantizes {count} activation{'s' * (count != 1)} in {bits} bits, one step size each.{why}")
    return True


def _points(trainer: Any, module: nn.Module, batch: Any, batch_idx: int, bits: int) -> Points:
    step = CapturedStep.of(module, trainer, "training_step", step_arguments(module, batch, batch_idx), {})
    copied = copy_module(module)
    try:
        places = find_points(copied, lambda: Sandbox(module, trainer).run(copied, step, None))
    except Exception as error:  # the user's step may raise any exception on a copy
        warn(
            f"SelfCompression: the first training step could not be run on a copy ({type(error).__name__}: {error}), "
            f"so activations stay in float. calibrate_activations quantizes those of the trained network."
        )
        return {}
    if not places:
        reason = " where parameters are sharded" * shards_parameters(trainer.strategy)
        warn(
            f"SelfCompression: no input of a linear layer or convolution was found{reason}, so activations stay float."
        )
    return points_of(places, bits)


def let_activations_train(module: nn.Module, wanted: bool = True) -> None:
    """Has the exponents of activations get gradients, or not."""
    for _, part in activated_modules(module):
        exponents_of(part).requires_grad_(wanted)
