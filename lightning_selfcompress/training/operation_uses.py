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


def uses_of_step(trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> tuple[dict[str, float], int]:
    """Counts how often a training step uses each weight, on a copy of the module.

    Args:
        trainer: The Trainer.
        module: The converted module.
        batch: The batch of the step.
        batch_idx: Its number.

    Returns:
        The uses of each weight by its name, and the number of samples in the batch.

    Raises:
        Exception: Whatever the module's step raises on a copy.
    """
    step = CapturedStep.of(module, trainer, "training_step", step_arguments(module, batch, batch_idx), {})
    copied = copy_module(module)
    with counting_uses(copied) as uses:
        Sandbox(module, trainer).run(copied, step, None)
    return uses, max(1, int(extract_batch_size(batch)))


def note_uses_of_step(trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
    """Notes how often one sample of a training step that is about to run uses each weight.

    Args:
        trainer: The Trainer.
        module: The converted module.
        batch: The batch of the step.
        batch_idx: Its number.
    """
    try:
        uses, samples = uses_of_step(trainer, module, batch, batch_idx)
    except Exception as error:  # the user's step may raise any exception on a copy
        warn(
            f"SelfCompression: operations could not be counted on a copy of the first training step "
            f"({type(error).__name__}: {error}), so every weight counts as used once, as with price='bits'."
        )
        uses, samples = dict.fromkeys((p.name for p in quantized_parameters(module)), 1.0), 1
    note_uses(module, uses, samples)
