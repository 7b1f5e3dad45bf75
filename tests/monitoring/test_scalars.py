"""What loggers get."""

import torch
from torch import nn

from lightning_selfcompress.monitoring.scalars import layer_scalars, total_scalars
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.size.report import size_report


def net():
    """Two layers with depths 8, and one channel without bits."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    convert(model)
    with torch.no_grad():
        model[1].bit_depth[0] = -0.5
    return model


def test_scalars_are_the_reports_totals():
    """Bits per weight, bytes, weights left and what these cost, under the names that callbacks monitor."""
    report = size_report(net())
    assert total_scalars(report, 0.5, 3.2) == {
        "selfcompress/bits_per_weight": (6 * 8 + 2 * 8) / 10,
        "selfcompress/gamma": 0.5,
        "selfcompress/size_loss": 3.2,
        "selfcompress/percent_of_float": 100 * (report.nbytes / report.float_nbytes),
        "selfcompress/nbytes": report.nbytes,
        "selfcompress/weights_left": 0.8,
        "selfcompress_chart/share_of_float": report.nbytes / report.float_nbytes,
    }


def test_layer_scalars_are_bits_and_channels_of_each_layer():
    """Bits per weight and channels alive of each layer, named by it, and the channels of all."""
    assert layer_scalars(size_report(net())) == {
        "selfcompress_bits/0": 8.0,
        "selfcompress_bits/1": 4.0,
        "selfcompress_channels/0": 2.0,
        "selfcompress_channels/1": 1.0,
        "selfcompress_channels/total": 3.0,
    }
