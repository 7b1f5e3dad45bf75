"""Every private name of Lightning that this package uses. Each was looked up in Lightning 2.4 and 2.6."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

MULTIPROCESSING_LAUNCHER = "_MultiProcessingLauncher"  # of strategies that spawn or fork their processes


def averaged_models(callbacks: Iterable[Any]) -> Iterator[nn.Module]:
    """The copies of the trained module that weight averaging keeps, without torch's wrapper.

    Args:
        callbacks: The callbacks of a Trainer.
    """
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average


def batches_that_stepped(trainer: Any) -> int:
    """Batches of this fit that ended with a step of an optimizer: the x axis of Lightning's own logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def accumulates(trainer: Any) -> bool:
    """Whether the batch that has just run is followed by another one before the optimizer steps."""
    return bool(trainer.fit_loop._should_accumulate())


def logs_are_due(trainer: Any) -> bool:
    """Whether Lightning writes to its loggers after this batch."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)


def validates_by_time(trainer: Any) -> bool:
    """Whether validations come after a time, and not with the epochs."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def saves_after_this_batch(checkpoint: Any, trainer: Any) -> bool:
    """Whether a ModelCheckpoint is about to save at the end of this batch, by its number of steps or its interval."""
    steps = getattr(checkpoint, "_every_n_train_steps", 0) or 0
    interval = getattr(checkpoint, "_train_time_interval", None)
    if interval is not None:
        last = getattr(checkpoint, "_last_time_checked", None)
        soon = interval.total_seconds() - 1  # its own clock is read later in the same batch
        return last is not None and time.monotonic() - last >= soon
    return steps >= 1 and trainer.global_step % steps == 0


def logged_prefix(logger: Any) -> str:
    """What a logger puts before the name of every scalar."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""


def has_default_metric(logger: Any) -> bool:
    """Whether a TensorBoardLogger declares ``hp_metric`` for hyperparameters that are logged without a metric."""
    return bool(getattr(logger, "_default_hp_metric", False))
