"""What one training shows of itself, at each hook of the callback."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_selfcompress.monitoring.channel_bits import ChannelBits
from lightning_selfcompress.monitoring.scalars import (
    PREFIX,
    layer_scalars,
    log,
    log_channel_bits,
    log_histogram,
    make_known,
    total_scalars,
)
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.report import SizeReport, size_report
from lightning_selfcompress.training.depth_training import loss_scale
from lightning_selfcompress.training.lightning_private import (
    accumulates,
    batches_that_stepped,
    logs_are_due,
    saves_after_this_batch,
)


class Monitor:
    """Logs the size of a module while a Trainer trains it, and lets callbacks monitor it.

    Args:
        gamma: The weight of the price in the loss, for a Trainer.
        size_loss: Gamma times the price, for a Trainer.

    Attributes:
        loss: The loss of the last backward pass; None before the first one.
        channel_bits: Which of the original channels are left.
    """

    def __init__(self, *, gamma: Callable[[Any], float], size_loss: Callable[[Any], float]) -> None:
        self._gamma, self._size_loss = gamma, size_loss
        self._target: int | None = None
        self.loss: Tensor | None = None
        self.channel_bits = ChannelBits()

    def begin(self, target: int | None, state: Mapping[str, Any] | None) -> None:
        """Begins a training.

        Args:
            target: The largest file that is allowed, in bytes; None without a budget.
            state: What :meth:`state_dict` of an earlier training returned, to go on from there.
        """
        self._target, self.loss = target, None
        if state is not None:
            self.channel_bits = ChannelBits(state["channel_bits"])

    def state_dict(self) -> dict[str, Any]:
        """What is shown of a training that goes on from here."""
        return {"channel_bits": self.channel_bits.state_dict()}

    def removed(self, shrunk: Iterable[Shrunk]) -> None:
        """Takes note of a removal."""
        self.channel_bits.removed(shrunk)

    def refresh(self, trainer: Any, module: nn.Module) -> None:
        """Makes the size as it is now known to callbacks that monitor it; nothing is logged."""
        make_known(trainer, self._totals(trainer, module, size_report(module)))

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
        """Logs the totals, each layer's bits and channels, the bits of every channel and a histogram of them."""
        log(trainer, self._scalars(trainer, report) | layer_scalars(report))
        if trainer.is_global_zero:
            step = batches_that_stepped(trainer)
            log_histogram(trainer.loggers, module, step)
            log_channel_bits(trainer.loggers, self.channel_bits.of(module), step)

    def _scalars(self, trainer: Any, report: SizeReport) -> dict[str, float]:
        values = total_scalars(report, self._gamma(trainer), self._size_loss(trainer))
        return values if self._target is None else values | {f"{PREFIX}/target": float(self._target)}

    def _totals(self, trainer: Any, module: Any, report: SizeReport) -> dict[str, float]:
        """What is logged of the size, and of the loss that goes with it."""
        values = self._scalars(trainer, report)
        if self.loss is not None and self.loss.numel() == 1:
            accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
            values[f"{PREFIX}/loss"] = float(self.loss) * accumulated / loss_scale(trainer)
        return values
