"""What one training shows of itself, at each hook of the callback."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_selfcompress.monitoring.channel_bits import ChannelBits, depths
from lightning_selfcompress.monitoring.hyperparameters import DEFAULT, Hyperparameters
from lightning_selfcompress.monitoring.main_metric import MainMetric
from lightning_selfcompress.monitoring.progress_bar import fit_summary, show_size
from lightning_selfcompress.monitoring.scalars import PREFIX, layer_scalars, log, make_known, total_scalars
from lightning_selfcompress.monitoring.tensorboard import log_channel_bits, log_charts
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.report import SizeReport, size_report
from lightning_selfcompress.training.depth_training import loss_scale
from lightning_selfcompress.training.lightning_private import (
    accumulates,
    batches_that_stepped,
    logs_are_due,
    saves_after_this_batch,
)
from lightning_selfcompress.training.messages import tell


class Monitor:
    """Shows the size of a module while a Trainer trains it: to loggers, to callbacks, and in the progress bar.

    All processes compute what is shown, since a module may be spread over them; the first one writes.

    Args:
        gamma: The weight of the price in the loss, for a Trainer.
        size_loss: Gamma times the price, for a Trainer.
        hyperparameters: What is shown among the hyperparameters of a run.

    Attributes:
        loss: The loss of the last backward pass; None before the first one.
        channel_bits: Which of the original channels are left.
    """

    def __init__(
        self,
        *,
        gamma: Callable[[Any], float],
        size_loss: Callable[[Any], float],
        hyperparameters: Mapping[str, Any],
    ) -> None:
        self._gamma, self._size_loss, self._own = gamma, size_loss, hyperparameters
        self._target: int | None = None
        self._metric = MainMetric()
        self._hyperparameters = Hyperparameters((), {})
        self._has_charts = False
        self.loss: Tensor | None = None
        self.channel_bits = ChannelBits()

    def state_dict(self) -> dict[str, Any]:
        """What is shown of a training that goes on from here."""
        return {"channel_bits": self.channel_bits.state_dict()}

    def begin(self, trainer: Any, module: nn.Module, target: int | None, state: Mapping[str, Any] | None) -> None:
        """Begins a training.

        Args:
            trainer: The Trainer, before it logs the hyperparameters of the module.
            module: The converted module.
            target: The largest file that is allowed, in bytes; None without a budget.
            state: What :meth:`state_dict` of an earlier training returned, to go on from there.
        """
        self._target, self.loss, self._has_charts = target, None, False
        self._metric = MainMetric()
        if state is not None:
            self.channel_bits = ChannelBits(state["channel_bits"])
        sizes = _sizes(size_report(module, exact=False))
        self._hyperparameters = Hyperparameters(trainer.loggers if trainer.is_global_zero else (), self._own)
        self._hyperparameters.follow(sizes)

    def removed(self, shrunk: Iterable[Shrunk]) -> None:
        """Takes note of a removal."""
        self.channel_bits.removed(shrunk)

    def refresh(self, trainer: Any, module: nn.Module) -> None:
        """Makes the size as it is now known to callbacks that monitor it, and to the progress bar."""
        make_known(trainer, self._totals(trainer, module, size_report(module)))

    def begin_validation(self, trainer: Any) -> None:
        """Takes note of what is known before a validation."""
        self._metric.begin_validation(trainer)

    def end_validation(self, trainer: Any) -> None:
        """Takes note of what a validation has logged."""
        self._metric.end_validation(trainer)

    def end_batch(self, trainer: Any, module: Any) -> None:
        """Logs the totals when the loggers are due, unless the batch only accumulates."""
        if module.automatic_optimization and accumulates(trainer):
            return
        if logs_are_due(trainer):
            log(trainer, self._totals(trainer, module, size_report(module, exact=False)))
        by_size = [c for c in trainer.checkpoint_callbacks if str(getattr(c, "monitor", "")).startswith(f"{PREFIX}/")]
        if any(saves_after_this_batch(c, trainer) for c in by_size):  # what is recorded has to be the file's size
            self.refresh(trainer, module)

    def end_epoch(self, trainer: Any, module: nn.Module, report: SizeReport) -> None:
        """Logs the totals, each layer's bits and channels, the bits of every channel, and the charts of all that."""
        log(trainer, self._scalars(trainer, report) | layer_scalars(report))
        if not trainer.loggers:
            return
        bits, learned = self.channel_bits.of(module), depths(module)  # of sharded weights all processes have to ask
        if not trainer.is_global_zero:
            return
        step, metric = batches_that_stepped(trainer), self._metric.of(trainer)
        log_channel_bits(trainer.loggers, bits, learned, step)
        if metric is not None:
            self._draw_charts(trainer, metric)
            self._hyperparameters.log(metric, _sizes(report), step=step)

    def end(self, trainer: Any, module: nn.Module) -> None:
        """Says what the training has made of the module, and logs what waited for a metric that never came."""
        report, step, metric = size_report(module), batches_that_stepped(trainer), self._metric.of(trainer)
        tell(f"SelfCompression: {fit_summary(module, report)}")
        if not trainer.is_global_zero:
            return
        self._draw_charts(trainer, metric)
        self._hyperparameters.log(metric, _sizes(report), step=step)
        if metric is not None and DEFAULT not in trainer.callback_metrics:
            self._hyperparameters.fill_default(metric[1], step=step)

    def close(self) -> None:
        """Leaves loggers as they were."""
        self.loss = None
        self._hyperparameters.close()

    def _draw_charts(self, trainer: Any, metric: tuple[str, float] | None) -> None:
        """Has charts drawn, once a training."""
        if not self._has_charts:
            self._has_charts = True
            log_charts(trainer.loggers, metric, budget=self._target is not None)

    def _scalars(self, trainer: Any, report: SizeReport) -> dict[str, float]:
        show_size(trainer, report)
        values = total_scalars(report, self._gamma(trainer), self._size_loss(trainer))
        return values if self._target is None else values | {f"{PREFIX}/target": float(self._target)}

    def _totals(self, trainer: Any, module: Any, report: SizeReport) -> dict[str, float]:
        """What is logged of the size, and of the loss that goes with it."""
        values = self._scalars(trainer, report)
        if self.loss is not None and self.loss.numel() == 1:
            accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
            values[f"{PREFIX}/loss"] = float(self.loss) * accumulated / loss_scale(trainer)
        return values


def _sizes(report: SizeReport) -> dict[str, float]:
    """What is shown of the size beside hyperparameters."""
    return {f"{PREFIX}/nbytes": float(report.nbytes)}
