"""Batch normalization's statistics while a Trainer runs: estimated anew before anybody looks at them."""

from collections import deque
from typing import Any

import torch
from torch import nn

from lightning_selfcompress.running_statistics import reestimating, with_statistics
from lightning_selfcompress.tensors import copy_module, tensors_in
from lightning_selfcompress.training.messages import warn
from lightning_selfcompress.training.sandbox import CapturedStep, Sandbox
from lightning_selfcompress.training.watched_steps import step_arguments

_MOST = 16  # batches: the usual momentum of 0.1 averages over about 19
_LEAST = 4
_NBYTES = 1 << 28  # of all batches that are kept


class Normalization:
    """Keeps the last training batches of an epoch, and estimates statistics on them for the weights as they are.

    The batches are run through the training step of a copy, as before, so nothing but the statistics changes. An
    estimate uses half of the batches from one estimate to the next, at least 4 and at most 16.

    Args:
        module: A converted LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._steps: deque[tuple[CapturedStep, list[int]]] = deque(maxlen=_MOST)
        self._batch, self._is_fresh = 0, True
        self._told = False
        self._counts = self._count(module)

    def keep(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Keeps the arguments of a training step that is about to run."""
        self._batch, self._is_fresh = batch_idx + 1, False
        if not self._counts:
            return
        step = CapturedStep.of_batch(trainer, "training_step", step_arguments(module, batch, batch_idx), {})
        self._steps.append((step, _versions(step)))
        while len(self._steps) > 1 and sum(t.nbytes for s, _ in self._steps for t in tensors_in(s.args)) > _NBYTES:
            self._steps.popleft()

    def begin_epoch(self) -> None:
        """Forgets the batches of the last epoch, so that a run resumed there goes on as the straight one."""
        self._steps.clear()

    def refresh(self, trainer: Any, module: nn.Module, *, again: bool = False) -> None:
        """Estimates the statistics of the layers that were trained since the last estimate.

        Args:
            trainer: The Trainer.
            module: The module in training.
            again: Whether to estimate the statistics of all layers, since weights were changed otherwise.
        """
        counts = self._count(module)
        trained = [name for name, count in counts.items() if again or count != self._counts.get(name)]
        interval = trainer.val_check_batch if isinstance(trainer.val_check_batch, int) else self._batch
        wanted = min(_MOST, max(_LEAST, min(self._batch, interval) // 2))
        steps = [s for s, versions in self._steps if _versions(s) == versions][-wanted:]
        if not trained or not steps or (self._is_fresh and not again):
            return
        copied = copy_module(module)
        try:
            self._run(trainer, module, copied, trained, steps)
        except Exception as error:  # the user's step may raise any exception on a copy
            self._tell(error)
            return
        _take_over(module, copied, trained)
        self._counts, self._is_fresh = counts, True

    def close(self) -> None:
        """Forgets all batches."""
        self._steps.clear()

    @staticmethod
    def _count(module: nn.Module) -> dict[str, int]:
        return {name: int(layer.num_batches_tracked) for name, layer in with_statistics(module).items()}  # type: ignore[arg-type]

    @staticmethod
    def _run(trainer: Any, module: nn.Module, copied: nn.Module, trained: list[str], steps: list[CapturedStep]) -> None:
        sandbox = Sandbox(module, trainer)
        with reestimating(copied, trained), trainer.strategy.precision_plugin.train_step_context():
            for step in steps:
                with torch.no_grad():
                    sandbox.run(copied, step, None)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            warn(
                f"SelfCompression: the statistics of batch normalization could not be estimated anew on copies of the "
                f"last training steps ({type(error).__name__}: {error}), so validation may be worse than the network. "
                f"Estimate them before you judge it: recalibrate(model, loader)."
            )


def _versions(step: CapturedStep) -> list[int]:
    """Returns the versions of a step's tensors, which change where the step wrote into its batch."""
    return [t._version for t in tensors_in(step.args) if not t.is_inference()]


@torch.no_grad()
def _take_over(module: nn.Module, copied: nn.Module, paths: list[str]) -> None:
    own, there = with_statistics(module), with_statistics(copied)
    for path in paths:
        for statistic in ("running_mean", "running_var"):
            getattr(own[path], statistic).copy_(getattr(there[path], statistic))
