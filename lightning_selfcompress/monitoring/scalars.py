"""What loggers get of the size: scalars, the bits of every channel, and a histogram of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.report import SizeReport
from lightning_selfcompress.training.lightning_private import batches_that_stepped

PREFIX = "selfcompress"


def total_scalars(report: SizeReport, gamma: float, size_loss: float) -> dict[str, float]:
    """The totals of a network that is being trained.

    Args:
        report: Its sizes.
        gamma: The weight of the price in the loss.
        size_loss: Gamma times the price.

    Returns:
        ``selfcompress/bits_per_weight``: Q; ``nbytes``: bytes of the packed file;
        ``percent_of_float``: of the float network's bytes; ``channels``: channels alive; ``weights_left``: share of the
        weights, from 0 to 1; ``gamma``; ``size_loss``.
    """
    values = {
        "bits_per_weight": report.bits_per_weight,
        "nbytes": float(report.nbytes),
        "percent_of_float": 100 * report.nbytes / max(report.float_nbytes, 1),
        "channels": float(report.channels),
        "weights_left": report.weights_left,
        "gamma": gamma,
        "size_loss": size_loss,
    }
    return {f"{PREFIX}/{name}": value for name, value in values.items()}


def layer_scalars(report: SizeReport) -> dict[str, float]:
    """Learned bits per original weight of each layer, and its channels alive."""
    bits = {f"{PREFIX}/bits/{layer.name}": layer.mean_bits for layer in report.layers}
    return bits | {f"{PREFIX}/channels/{layer.name}": float(layer.channels) for layer in report.layers}


def make_known(trainer: Any, values: Mapping[str, float]) -> None:
    """Lets callbacks monitor values, such as ModelCheckpoint and EarlyStopping; nothing is logged."""
    trainer.callback_metrics.update({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})


def log(trainer: Any, values: Mapping[str, float]) -> None:
    """Writes values to all loggers of a Trainer, and lets callbacks monitor them."""
    make_known(trainer, values)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=batches_that_stepped(trainer))


def depths(model: nn.Module) -> Tensor:
    """Bit depths of all channels of a model, ``(channels,)``, on the CPU."""
    raw = [p.raw_depth.detach().float().cpu() for p in quantized_parameters(model)]
    return bit_depth(torch.cat(raw)) if raw else torch.zeros(0)


def log_histogram(loggers: Iterable[Any], model: nn.Module, step: int) -> None:
    """Logs a histogram of all depths to the loggers whose experiment can take one (TensorBoard's can)."""
    for logger in loggers:
        add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
        if callable(add_histogram):
            add_histogram(f"{PREFIX}/bit_depths", depths(model), step)


def log_channel_bits(loggers: Iterable[Any], bits: Mapping[str, Tensor], step: int) -> None:
    """Logs the bits of every original channel to the loggers whose experiment takes tensors (TensorBoard's does).

    Args:
        loggers: Loggers of Lightning.
        bits: What :meth:`ChannelBits.of` returns, logged under ``selfcompress/channel_bits/<name of the weight>``.
        step: The x axis.
    """
    for logger in loggers:
        add_tensor = getattr(getattr(logger, "experiment", None), "add_tensor", None)
        if callable(add_tensor):
            for name, values in bits.items():
                add_tensor(f"{PREFIX}/channel_bits/{name}", values, step)
