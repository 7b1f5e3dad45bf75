"""The checkpoints of one run that no other beats in both a metric and bytes."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_selfcompress.reporting.front import Mode, Point, beats, front
from lightning_selfcompress.size.report import size_report
from lightning_selfcompress.training.lightning_private import batches_that_stepped, validates_by_time
from lightning_selfcompress.training.messages import warn


class ParetoCheckpoint(Checkpoint):
    """Keeps the checkpoints that no other of the same run beats in both a metric and bytes.

    While a network gets smaller, each validation is another trade of accuracy for bytes. A checkpoint is saved where it
    is better than all that are kept in the metric, in the bytes of its packed file, or between two of them, and those
    that it beats are deleted. What is left is the front from which one chooses afterwards.

    >>> from lightning_selfcompress import ParetoCheckpoint, SelfCompression
    >>> kept = ParetoCheckpoint(monitor="val/accuracy")
    >>> callbacks = [SelfCompression(gamma=0.1), kept]  # after the fit: for point in kept.front: print(point)

    It stands beside a ModelCheckpoint, or alone: Lightning adds no ModelCheckpoint of its own to a Trainer that has
    one. ``trainer.test(ckpt_path="best")`` takes the first of them in the list; of the front that is the checkpoint
    with the best metric. A fit that goes on from a checkpoint goes on with the front of that time.

    Args:
        monitor: Name of the metric that the module logs in validation. Under DDP log it with ``sync_dist=True``; the
            value of the first process counts.
        mode: ``"max"`` for a metric that is good when it is large, such as an accuracy; ``"min"`` for a loss.
        dirpath: Folder of the checkpoints; by default the folder of the first logger, as for ModelCheckpoint.
        filename: Name of each file, which may hold names of metrics, as for ModelCheckpoint.
        save_weights_only: Whether the optimizers and callbacks are left out of the files, from which no fit can go on.

    Attributes:
        front: The checkpoints that are kept, from the fewest bytes to the most: each with its ``metric``, ``nbytes``,
            ``step`` and ``name``, the path of the file.
        best_model_path: The kept checkpoint with the best metric; empty before the first is saved.

    Raises:
        ValueError: If ``mode`` is none of both, or at a validation in which nothing of the name was logged.
    """

    def __init__(
        self,
        monitor: str,
        mode: Mode = "max",
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "pareto-{epoch}-{step}",
        save_weights_only: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise ValueError(f"Expected mode='max' or mode='min', got {mode!r}.")
        self.monitor, self.mode, self.save_weights_only = monitor, mode, save_weights_only
        self.front: tuple[Point, ...] = ()
        folder = None if dirpath is None else Path(dirpath)
        self._names = ModelCheckpoint(folder, filename, save_top_k=0)  # which knows Lightning's folders and names
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Several of these in one Trainer are told apart by what they monitor."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def dirpath(self) -> str:
        """The folder of the checkpoints; empty before a Trainer has told it."""
        return str(self._names.dirpath or "")

    @property
    def best_model_path(self) -> str:
        """The kept checkpoint with the best metric; empty before the first is saved."""
        return self._best().name

    @property
    def best_model_score(self) -> float | None:
        """The best metric of the checkpoints that are kept; None before the first is saved."""
        return self._best().metric if self.front else None

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the folder that the Trainer gives its checkpoints, unless one was named."""
        self._names.setup(trainer, pl_module, stage)
        self._last_step = -1

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Saves within epochs, where validations come as often, or only in some epochs."""
        if not _saves_at_epoch_end(trainer):
            self._consider(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Saves after the removal of an epoch, where there is one validation an epoch, or none."""
        if _saves_at_epoch_end(trainer):
            self._consider(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The front, in plain values."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "dirpath": self.dirpath,
            "front": [[p.metric, p.nbytes, p.step, p.name] for p in self.front],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the checkpoints of an earlier fit that are still there."""
        saved = [Point(*values) for values in state_dict["front"]]
        if state_dict["dirpath"] != self.dirpath:
            warn(
                f"ParetoCheckpoint: the folder was {state_dict['dirpath']!r} and is {self.dirpath!r} now, so the "
                f"{len(saved)} checkpoints of the earlier fit stay where they are, and the front begins anew."
            )
            return
        there = tuple(point for point in saved if Path(point.name).exists())
        if len(there) < len(saved):
            warn(
                f"ParetoCheckpoint: {len(saved) - len(there)} of {len(saved)} checkpoints of the earlier fit are not "
                f"in {self.dirpath!r} any more, since it went on after this one was saved; the others are kept."
            )
        self.front = there

    def _consider(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Saves a checkpoint if none that is kept is as good in both, and deletes those that it beats."""
        if getattr(trainer, "fast_dev_run", False) or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        metrics = dict(trainer.callback_metrics)
        measured = self._monitored(metrics), size_report(module).nbytes
        metric, nbytes = trainer.strategy.broadcast(measured)  # all processes save the same checkpoints
        step = batches_that_stepped(trainer)
        point = Point(metric, nbytes, step)
        if point not in front([*self.front, point], self.mode):
            return
        path = self._path(trainer, metrics)
        beaten = [kept for kept in self.front if beats(point, kept, self.mode)]
        self.front = front([*self.front, Point(metric, nbytes, step, path)], self.mode)
        trainer.save_checkpoint(path, self.save_weights_only)  # with the new front in it
        for old in beaten:
            self._delete(trainer, old.name)

    def _monitored(self, metrics: dict[str, torch.Tensor]) -> float:
        if self.monitor not in metrics:
            known = ", ".join(sorted(map(repr, metrics))) or "nothing"
            raise ValueError(
                f"Expected a metric {self.monitor!r} that the module logs in validation, found {known}. Log it with "
                f"self.log({self.monitor!r}, value) in validation_step, or name another one in ParetoCheckpoint()."
            )
        return float(metrics[self.monitor])

    def _path(self, trainer: "pl.Trainer", metrics: dict[str, torch.Tensor]) -> str:
        """Returns the path of the next file, of which there is none yet."""
        values = metrics | {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        path, version = self._names.format_checkpoint_name(values), 0
        while self._names.file_exists(path, trainer):
            version += 1
            path = self._names.format_checkpoint_name(values, ver=version)
        return path

    def _delete(self, trainer: "pl.Trainer", path: str) -> None:
        """Deletes a file that is beaten, in the first process, unless the fit went on from it."""
        resumed = trainer.ckpt_path is not None and Path(trainer.ckpt_path).absolute() == Path(path).absolute()
        if not resumed:
            trainer.strategy.remove_checkpoint(path)

    def _best(self) -> Point:
        """The point with the best metric: the largest file of the front."""
        return self.front[-1] if self.front else Point(float("nan"), 0)


def _saves_at_epoch_end(trainer: "pl.Trainer") -> bool:
    """Whether a validation, if there is any, ends each epoch, so that the removal after it belongs to it."""
    if not trainer.enable_validation:
        return True
    by_epochs = trainer.check_val_every_n_epoch == 1 and not validates_by_time(trainer)
    return by_epochs and trainer.val_check_interval == 1.0
