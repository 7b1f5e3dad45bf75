"""What loggers get."""

import torch
from torch import nn

from lightning_selfcompress.monitoring.scalars import depths, layer_scalars, log_histogram, total_scalars
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.size.report import size_report


class Board:
    """A logger whose experiment takes histograms, or does not."""

    def __init__(self, takes=True):
        self.experiment = self if takes else object()
        self.taken = []

    def add_histogram(self, tag, values, step):
        self.taken.append((tag, values.tolist(), step))


def net():
    """Two layers with depths 8, and one channel without bits."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    convert(model)
    with torch.no_grad():
        model[1].bit_depth[0] = -0.5
    return model


def test_scalars_are_the_reports_totals():
    """Bits per weight, bytes, channels, weights left and what these cost, under the names that callbacks monitor."""
    report = size_report(net())
    assert total_scalars(report, 0.5, 3.2) == {
        "selfcompress/bits_per_weight": (6 * 8 + 2 * 8) / 10,
        "selfcompress/gamma": 0.5,
        "selfcompress/size_loss": 3.2,
        "selfcompress/percent_of_float": 100 * report.nbytes / report.float_nbytes,
        "selfcompress/nbytes": report.nbytes,
        "selfcompress/channels": 3,
        "selfcompress/weights_left": 0.8,
    }


def test_layer_scalars_are_bits_and_channels_of_each_layer():
    """Bits per weight and channels alive of each layer, named by it."""
    assert layer_scalars(size_report(net())) == {
        "selfcompress/bits/0": 8.0,
        "selfcompress/bits/1": 4.0,
        "selfcompress/channels/0": 2.0,
        "selfcompress/channels/1": 1.0,
    }


def test_depths_are_never_negative():
    """The histogram shows bit depths, not the raw parameters."""
    assert depths(net()).tolist() == [8.0, 8.0, 0.0, 8.0]
    assert depths(nn.ReLU()).tolist() == []


def test_histogram_goes_to_the_loggers_that_take_one():
    """A logger without histograms is passed over, the others get every depth."""
    board = Board()
    log_histogram([Board(takes=False), board], net(), 7)
    assert board.taken == [("selfcompress/bit_depths", [8.0, 8.0, 0.0, 8.0], 7)]
