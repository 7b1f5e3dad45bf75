"""The scalars that every logger gets of the size, and that callbacks can monitor."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_selfcompress.size.report import SizeReport
from lightning_selfcompress.training.lightning_private import batches_that_stepped

PREFIX = "selfcompress"
SHARE = f"{PREFIX}_chart/share_of_float"  # in a group of its own, which only a chart draws


def total_scalars(report: SizeReport, gamma: float, size_loss: float) -> dict[str, float]:
    """The totals of a network that is being trained.

    Args:
        report: Its sizes.
        gamma: The weight of the price in the loss.
        size_loss: Gamma times the price.

    Returns:
        ``selfcompress/bits_per_weight``: Q; ``nbytes``: bytes of the packed file; ``percent_of_float``: of the float
        network's bytes; ``weights_left``: share of the weights, from 0 to 1; ``gamma``; ``size_loss``. And
        ``selfcompress_chart/share_of_float``, from 0 to 1, to be drawn beside an accuracy.
    """
    values = {
        "bits_per_weight": report.bits_per_weight,
        "nbytes": float(report.nbytes),
        "percent_of_float": 100 * report.share_of_float,
        "weights_left": report.weights_left,
        "gamma": gamma,
        "size_loss": size_loss,
    }
    return {f"{PREFIX}/{name}": value for name, value in values.items()} | {SHARE: report.share_of_float}


def layer_scalars(report: SizeReport) -> dict[str, float]:
    """Learned bits per original weight of each layer, and channels alive, of each layer and in total."""
    bits = {f"{PREFIX}_bits/{layer.name}": layer.mean_bits for layer in report.layers}
    channels = {f"{PREFIX}_channels/{layer.name}": float(layer.channels) for layer in report.layers}
    return {f"{PREFIX}_channels/total": float(report.channels)} | bits | channels


def make_known(trainer: Any, values: Mapping[str, float]) -> None:
    """Lets callbacks monitor values, such as ModelCheckpoint and EarlyStopping; nothing is logged."""
    trainer.callback_metrics.update({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})


def log(trainer: Any, values: Mapping[str, float]) -> None:
    """Writes values to all loggers of a Trainer, and lets callbacks monitor them."""
    make_known(trainer, values)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=batches_that_stepped(trainer))
