"""The metric by which a training is judged, which is shown beside the size."""

from collections.abc import Iterable
from typing import Any

from lightning_selfcompress.monitoring.scalars import PREFIX


def monitored_metrics(callbacks: Iterable[Any]) -> list[str]:
    """Returns the names of the metrics that callbacks monitor, in their order; a size of this package does not count.

    Args:
        callbacks: Callbacks such as ModelCheckpoint and EarlyStopping.
    """
    names = [str(name) for c in callbacks if (name := getattr(c, "monitor", None)) is not None]
    return [name for name in names if not name.startswith(PREFIX)]


class MainMetric:
    """Finds what ModelCheckpoint or EarlyStopping monitors, else what validation logs first; a size does not count."""

    def __init__(self) -> None:
        self._before: frozenset[str] = frozenset()
        self._first: str | None = None  # of what the first validation has logged

    def begin_validation(self, trainer: Any) -> None:
        """Takes note of what is known before a validation."""
        self._before = frozenset(trainer.callback_metrics)

    def end_validation(self, trainer: Any) -> None:
        """Takes note of what the first validation has logged."""
        new = [n for n in trainer.callback_metrics if n not in self._before and not n.startswith(PREFIX)]
        self._first = self._first or next(iter(new), None)

    def of(self, trainer: Any) -> tuple[str, float] | None:
        """Returns the name of the metric and its value of now, or None before it was logged.

        Args:
            trainer: The Trainer.
        """
        names = monitored_metrics([*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks])
        names += [self._first] if self._first is not None and not names else []
        known = trainer.callback_metrics
        return next(((name, float(known[name])) for name in names if name in known), None)
