"""What TensorBoard gets besides scalars: each channel's bits, as numbers, as a picture and in histograms; charts."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_selfcompress.monitoring.picture import bits_picture, can_draw
from lightning_selfcompress.monitoring.scalars import PREFIX, SHARE
from lightning_selfcompress.training.lightning_private import logged_prefix

_LARGEST_SHARE = 2.0  # up to here a metric is drawn beside a share from 0 to 1, above it beside percent

Layout = dict[str, dict[str, list[Any]]]


def _experiments(loggers: Iterable[Any], method: str) -> Iterator[tuple[Any, Any]]:
    """Yields the loggers whose experiment has a method, such as TensorBoard's, and the method."""
    for logger in loggers:
        taking = getattr(getattr(logger, "experiment", None), method, None)
        if callable(taking):
            yield logger, taking


def log_channel_bits(loggers: Iterable[Any], bits: Mapping[str, Tensor], depths: Tensor, step: int) -> None:
    """Logs the bits of every channel to the loggers that take tensors, pictures and histograms.

    Args:
        loggers: Loggers of Lightning.
        bits: What :meth:`ChannelBits.of` returns. Its tensors are logged as they are, under
            ``selfcompress/channel_bits/<name of the weight>``; together they are a picture,
            ``selfcompress_coded_bits/channels``, and a histogram of what is left,
            ``selfcompress_coded_bits/histogram``.
        depths: The learned bit depths of all channels that are left, ``(channels,)``, for the histogram
            ``selfcompress_depths/histogram``.
        step: The x axis.
    """
    for _, add_tensor in _experiments(loggers, "add_tensor"):
        for name, values in bits.items():
            add_tensor(f"{PREFIX}/channel_bits/{name}", values, step)
    left = torch.cat([v[~v.isnan()] for v in bits.values()]) if bits else torch.zeros(0)
    for _, add_histogram in _experiments(loggers, "add_histogram"):
        add_histogram(f"{PREFIX}_coded_bits/histogram", left, step)
        add_histogram(f"{PREFIX}_depths/histogram", depths, step)
    for _, add_image in _experiments(loggers, "add_image") if can_draw() else ():
        add_image(f"{PREFIX}_coded_bits/channels", bits_picture(bits), step, dataformats="HWC")


def chart_layout(metric: tuple[str, float] | None, *, budget: bool, prefix: str = "") -> Layout:
    """Returns the charts of the tab Custom Scalars.

    TensorBoard draws the curves of a chart on one axis. So a metric is drawn beside the size on the scale that is
    nearer to its own: as a share of the float network, from 0 to 1, or in percent.

    >>> chart_layout(("val_acc", 0.9), budget=False)["selfcompress"]["val_acc and size"]
    ['Multiline', ['val_acc$', 'selfcompress_chart/share_of_float$']]

    Args:
        metric: Name and value of the metric that matters, if there is one.
        budget: Whether the training has a size to end at.
        prefix: What a logger puts before each name.

    Returns:
        Category -> title -> kind of chart and tags, which TensorBoard takes for regular expressions.
    """
    charts: dict[str, list[str]] = {}
    if metric is not None:
        name, value = metric
        small = math.isfinite(value) and abs(value) <= _LARGEST_SHARE
        charts[f"{name} and size"] = [name, SHARE if small else f"{PREFIX}/percent_of_float"]
    charts["bytes of the packed file"] = [f"{PREFIX}/nbytes", *([f"{PREFIX}/target"] * budget)]
    charts["loss, and gamma times the price"] = [f"{PREFIX}/loss", f"{PREFIX}/size_loss"]
    named = {title: ["Multiline", [f"{re.escape(prefix + tag)}$" for tag in tags]] for title, tags in charts.items()}
    return {PREFIX: named}


def log_charts(loggers: Iterable[Any], metric: tuple[str, float] | None, *, budget: bool) -> None:
    """Has the loggers that can draw charts of several curves: metric and size, bytes and target, loss and price.

    Args:
        loggers: Loggers of Lightning.
        metric: Name and value of the metric that matters, if there is one.
        budget: Whether the training has a size to end at.
    """
    for logger, add_custom_scalars in _experiments(loggers, "add_custom_scalars"):
        add_custom_scalars(chart_layout(metric, budget=budget, prefix=logged_prefix(logger)))
