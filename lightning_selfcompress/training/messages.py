"""What is said while a Trainer runs: one Python logger, whose lines never break the line of a progress bar.

``logging.getLogger("lightning_selfcompress")`` decides how much is said: ``INFO``, where it begins, is a line for each
removal and for what a user should know once; ``DEBUG`` is every detail of each removal; ``WARNING`` is silence.
"""

import logging
import sys
import weakref
from typing import Any

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_selfcompress.tensors import is_a

LOGGER = logging.getLogger("lightning_selfcompress")
_BARS_OF_TQDM = ("train_progress_bar", "val_progress_bar", "test_progress_bar", "predict_progress_bar")


@rank_zero_only
def tell(text: str, level: int = logging.INFO) -> None:
    """Says something once, however many processes there are."""
    LOGGER.log(level, text)


def warn(text: str) -> None:
    """Warns, on a line of its own."""
    _HANDLER.clear_bar()
    rank_zero_warn(text, stacklevel=5)


def speak_beside(trainer: Any) -> None:
    """Has what is said written above the progress bar of a Trainer, where one is drawn."""
    _HANDLER.trainer = weakref.ref(trainer)


class _BesideTheBar(logging.Handler):
    """Writes above the active progress bar, or to stderr where there is none.

    Where the root logger has handlers, those write; the bar's line is cleared for them.
    """

    trainer: Any = staticmethod(lambda: None)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        try:
            bar = self._active_bar()
            if logging.getLogger().handlers:
                self.clear_bar()
            elif bar is not None:
                bar.print(self.format(record))
            else:
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as every handler of the standard library does
            self.handleError(record)

    def clear_bar(self) -> None:
        """Clears the line of an active bar of tqdm, which draws itself anew at its next step."""
        for drawn in _drawn_by_tqdm(self._active_bar()):
            drawn.clear()

    def _active_bar(self) -> Any:
        """Returns the progress bar of the Trainer if it is drawn now."""
        bar = getattr(self.trainer(), "progress_bar_callback", None)
        if is_a(bar, "TQDMProgressBar"):
            return bar if _drawn_by_tqdm(bar) else None
        live = getattr(getattr(bar, "progress", None), "live", None)  # of rich
        return bar if live is None or live.is_started else None


def _drawn_by_tqdm(bar: Any) -> list[Any]:
    """Returns the bars of a TQDMProgressBar that are on the screen; its properties raise where there is none."""
    found = []
    for name in _BARS_OF_TQDM if is_a(bar, "TQDMProgressBar") else ():
        try:
            found.append(getattr(bar, name))
        except TypeError:
            continue
    return [drawn for drawn in found if not drawn.disable]


_HANDLER = _BesideTheBar()
LOGGER.addHandler(_HANDLER)
if LOGGER.level == logging.NOTSET:  # whoever has set a level before keeps it
    LOGGER.setLevel(logging.INFO)
