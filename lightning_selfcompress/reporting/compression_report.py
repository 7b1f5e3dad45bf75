"""The callback that writes a report of the run at the end of a fit."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_selfcompress.monitoring.main_metric import monitored_metrics
from lightning_selfcompress.monitoring.scalars import PREFIX
from lightning_selfcompress.quantize.conversion_plan import plan_conversion
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.reporting.front import Mode, Point
from lightning_selfcompress.reporting.history import (
    FloatLayer,
    RunHistory,
    guess_metric,
    guess_mode,
    sizes_of,
)
from lightning_selfcompress.reporting.page import check_path, report_page, write_page
from lightning_selfcompress.reporting.recording import Recording, command_of
from lightning_selfcompress.size.report import float_nbytes_of, size_report
from lightning_selfcompress.tensors import is_a
from lightning_selfcompress.training.lightning_private import batches_that_stepped
from lightning_selfcompress.training.messages import tell
from lightning_selfcompress.training.operation_uses import note_uses_of_step, uses_are_known
from lightning_selfcompress.training.strategies import shards_parameters


class CompressionReport(pl.Callback):
    """Writes one HTML file about the run at the end of a fit: what became of size and metric, and of every channel.

    The file needs no network and no logger: curves, the bits of all channels over time, the layers before and after,
    what was not compressed and why, the front of the metric against bytes, and the command that ran the training, which
    is copied as it was given. ``selfcompress report RUN`` writes the same page of a run that is over.

    >>> from lightning_selfcompress import CompressionReport, SelfCompression
    >>> callbacks = [SelfCompression(gamma=0.1), CompressionReport("report.html", monitor="val/accuracy")]

    The record goes into checkpoints, so that a fit which goes on from one of them reports the whole run.

    Args:
        path: The file to write; its folder is made if there is none. The file is replaced if it exists.
        monitor: Name of the metric that is set against the bytes. By default what a ParetoCheckpoint, a ModelCheckpoint
            or an EarlyStopping of the same Trainer monitors, unless that is a size, or else the scalar that most likely
            tells how good a network is.
        mode: ``"max"`` if a good metric is a large one, ``"min"`` if it is a small one; by default as its name says.

    Raises:
        ValueError: At the start of a fit, if there is no SelfCompression in the Trainer.
        OSError: At the start of a fit, if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], monitor: str = "", mode: Mode | None = None) -> None:
        super().__init__()
        self.path, self.monitor, self.mode = Path(path), monitor, mode
        self._recording = Recording(command=command_of())
        self._counted = False

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses a file that could not be written, before hours are spent."""
        if stage != "fit":
            return
        self._compression(trainer)
        if trainer.global_step == 0:  # another run than the last one of this callback; a checkpoint is loaded later
            self._recording, self._counted = Recording(command=command_of()), False
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_path(self.path)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Records the network as the removal of the last epoch has left it."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts once how often an inference uses each weight."""
        if self._counted:
            return
        self._counted = True
        if trainer.is_global_zero and not shards_parameters(trainer.strategy) and not uses_are_known(pl_module):
            failure = note_uses_of_step(trainer, pl_module, batch, batch_idx)
            if failure:
                tell(
                    f"CompressionReport: multiply-accumulates are left out, since they could not be counted on a copy "
                    f"of a training step ({failure})."
                )

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Records the metrics of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recording.add(batches_that_stepped(trainer), _scalars(trainer))

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Writes the report."""
        self._record(trainer, pl_module)
        history = self._history(trainer, pl_module)  # in all processes, which sharded weights need
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            write_page(report_page(history), self.path)
            tell(f"CompressionReport: {self.path}")

    def state_dict(self) -> dict[str, Any]:
        """The record so far."""
        return {"recording": self._recording.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the record of an earlier fit, of which the command of this one is the last part."""
        command = self._recording.command
        self._recording = Recording.from_state(state_dict["recording"])
        self._recording.command = command or self._recording.command

    def _record(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        step = batches_that_stepped(trainer)
        known = _scalars(trainer)
        if trainer.enable_validation:  # whose metrics are recorded when they are measured
            known = {tag: value for tag, value in known.items() if tag.startswith(f"{PREFIX}/")}
        self._recording.add(step, known)
        self._recording.metric = self._metric(trainer)
        self._recording.add_frame(step, self._compression(trainer).channel_bits(module))
        self._recording.before = {p.name: FloatLayer.of(p) for p in quantized_parameters(module)}
        self._recording.float_nbytes = float_nbytes_of(module)
        skip = self._compression(trainer).skip
        self._recording.left_in_float = plan_conversion(module, skip=skip).left_in_float

    def _history(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> RunHistory:
        recording, metric = self._recording, self._metric(trainer)
        points = [p for c in _pareto_checkpoints(trainer) if c.monitor == metric for p in c.front]
        return RunHistory(
            name=type(module).__name__,
            scalars=recording.scalars,
            metric=metric,
            mode=self._mode(trainer, metric),
            frames=recording.frames,
            left_in_float=recording.left_in_float,
            kept=tuple(Point(p.metric, p.nbytes, p.step, p.name) for p in points),
            command=recording.command,
            **sizes_of(size_report(module)),
        )

    def _metric(self, trainer: "pl.Trainer") -> str:
        watching = [*_pareto_checkpoints(trainer), *trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
        known = [name for name in monitored_metrics(watching) if name in self._recording.points]
        return self.monitor or next(iter(known), "") or guess_metric(list(self._recording.points))

    def _mode(self, trainer: "pl.Trainer", metric: str) -> Mode:
        modes: list[Mode] = [c.mode for c in _pareto_checkpoints(trainer) if c.monitor == metric]
        return self.mode or (modes[0] if modes else guess_mode(metric))

    def _compression(self, trainer: "pl.Trainer") -> Any:
        """Returns the callback whose work is reported."""
        found = [c for c in trainer.callbacks if is_a(c, "SelfCompression")]  # type: ignore[attr-defined]
        if not found:
            raise ValueError(
                "Expected a SelfCompression among the Trainer's callbacks for CompressionReport to report, found none. "
                "Add one, or leave the report out."
            )
        return found[0]


def _scalars(trainer: "pl.Trainer") -> dict[str, float]:
    """The metrics of the module and the totals of the size; what is logged of single layers is in the bits."""
    return {tag: float(v) for tag, v in trainer.callback_metrics.items() if not tag.startswith(f"{PREFIX}_")}


def _pareto_checkpoints(trainer: "pl.Trainer") -> list[Any]:
    return [c for c in trainer.callbacks if is_a(c, "ParetoCheckpoint")]  # type: ignore[attr-defined]
