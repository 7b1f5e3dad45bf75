"""Trainings within a benchmark say nothing."""

import logging


def quiet() -> None:
    """Silences the loggers of Lightning and of this package, errors apart."""
    for name in ("lightning.pytorch", "lightning_selfcompress"):
        logging.getLogger(name).setLevel(logging.ERROR)
