"""Sizes as what loggers take: scalars and a histogram."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.report import SizeReport

PREFIX = "selfcompress"


def scalars(report: SizeReport) -> dict[str, float]:
    """The totals: learned bits per original weight, bytes of the network, channels alive, share of weights left."""
    return {
        f"{PREFIX}/bits_per_weight": report.bits_per_weight,
        f"{PREFIX}/nbytes": float(report.nbytes),
        f"{PREFIX}/channels": float(report.channels),
        f"{PREFIX}/weights_left": report.weights_left,
    }


def layer_scalars(report: SizeReport) -> dict[str, float]:
    """Learned bits per original weight of each layer, and its channels alive."""
    bits = {f"{PREFIX}/bits/{layer.name}": layer.mean_bits for layer in report.layers}
    return bits | {f"{PREFIX}/channels/{layer.name}": float(layer.channels) for layer in report.layers}


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
