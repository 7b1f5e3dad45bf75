"""How often a training step uses each weight, counted on a copy before the first step is done."""

from typing import Any

from lightning.pytorch.utilities.data import extract_batch_size
from torch import nn

from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.operations import counting_uses, note_uses, uses_of
from lightning_selfcompress.tensors import copy_module
from lightning_selfcompress.training.messages import warn
from lightning_selfcompress.training.sandbox import CapturedStep, Sandbox
from lightning_selfcompress.training.watched_steps import step_arguments


def uses_are_known(module: nn.Module) -> bool:
    """Returns whether it is noted how often the weights of a module are used, or there are none."""
    weights = list(quantized_parameters(module))
    return not weights or any(uses_of(p) is not None for p in weights)


def note_uses_of_step(trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> str:
    """Notes how often one sample of a training step uses each weight, counted on a copy of the module.

    Args:
        trainer: The Trainer.
        module: The converted module.
        batch: The batch of the step.
        batch_idx: Its number.

    Returns:
        Why the uses could not be counted, and nothing is noted; empty if they were.
    """
    try:
        step = CapturedStep.of(module, trainer, "training_step", step_arguments(module, batch, batch_idx), {})
        copied = copy_module(module)
        with counting_uses(copied) as uses:
            Sandbox(module, trainer).run(copied, step, None)
        samples = max(1, int(extract_batch_size(batch)))
    except Exception as error:  # the user's step may raise any exception on a copy
        return f"{type(error).__name__}: {error}"
    note_uses(module, uses, samples)
    return ""


def note_uses_for_price(trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
    """Notes how often a training step that is about to run uses each weight; once each where it cannot be counted.

    Args:
        trainer: The Trainer.
        module: The converted module.
        batch: The batch of the step.
        batch_idx: Its number.
    """
    failure = note_uses_of_step(trainer, module, batch, batch_idx)
    if failure:
        warn(
            f"SelfCompression: operations could not be counted on a copy of the first training step ({failure}), so "
            f"every weight counts as used once, as with price='bits'."
        )
        note_uses(module, dict.fromkeys((p.name for p in quantized_parameters(module)), 1.0), 1)
