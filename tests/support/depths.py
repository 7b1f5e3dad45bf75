"""Networks whose channels have depths of all kinds."""

import torch
from torch import nn

from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import quantized_parameters


def with_depths(model, low=-1.0, high=9.0):
    """The model, converted, with random raw depths; some channels are dead, some are clipped, some codes vanish."""
    convert(model)
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.raw_depth.uniform_(low, high)
            p.exponent.add_((torch.randn(p.channels) * 32).round() / 16)
    return model


def mixed_net():
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 3, 3),
            "norm": nn.BatchNorm2d(3),
            "up": nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
            "rnn": nn.LSTM(3, 4, bidirectional=True),
            "attn": nn.MultiheadAttention(4, 2),
            "embed": nn.Embedding(7, 5),
        }
    )
