"""Layers of every kind that can be quantized, with inputs that reach all of their weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class OwnLinear(nn.Linear):
    """A user's layer that reads its weight itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


class OwnConv(nn.Conv2d):
    """A user's layer with state of its own."""

    def __init__(self, *args, scale=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


class OwnLSTM(nn.LSTM):
    """A user's recurrent layer that returns less."""

    def forward(self, x):
        return super().forward(x)[0]


@dataclass(frozen=True)
class Kind:
    """How to make a layer, and inputs that reach all of its weights."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


def noise(*shape):
    return lambda: (torch.randn(shape),)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(5, 4), noise(3, 5)),
    "Linear without bias": Kind(lambda: nn.Linear(5, 4, bias=False), noise(3, 5)),
    "Conv1d": Kind(lambda: nn.Conv1d(3, 4, 3), noise(2, 3, 7)),
    "Conv2d": Kind(lambda: nn.Conv2d(3, 4, 3, padding=1), noise(2, 3, 5, 5)),
    "Conv2d, groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), noise(2, 4, 7, 7)),
    "Conv2d, depthwise": Kind(
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding_mode="circular", padding=1), noise(2, 4, 5, 5)
    ),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 3, 2), noise(2, 2, 3, 3, 3)),
    "ConvTranspose1d": Kind(lambda: nn.ConvTranspose1d(3, 4, 3), noise(2, 3, 5)),
    "ConvTranspose2d": Kind(lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), noise(2, 3, 4, 4)),
    "ConvTranspose2d, groups": Kind(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), noise(2, 4, 4, 4)),
    "ConvTranspose3d": Kind(lambda: nn.ConvTranspose3d(2, 3, 2, groups=1), noise(2, 2, 3, 3, 3)),
    "Embedding": Kind(lambda: nn.Embedding(6, 4, padding_idx=0), lambda: (torch.arange(1, 6).repeat(2, 1),)),
    "EmbeddingBag": Kind(lambda: nn.EmbeddingBag(6, 4), lambda: (torch.arange(6).view(2, 3),)),
    "Bilinear": Kind(lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(6, 3), torch.randn(6, 4))),
    "MultiheadAttention": Kind(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: (torch.randn(3, 5, 4),) * 3
    ),
    "MultiheadAttention, kdim": Kind(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True),
        lambda: (torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.randn(2, 6, 5)),
    ),
    "LSTM": Kind(
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True), noise(2, 5, 3)
    ),
    "GRU": Kind(lambda: nn.GRU(3, 4), noise(5, 2, 3)),
    "RNN": Kind(lambda: nn.RNN(3, 4, num_layers=2, bias=False), noise(5, 2, 3)),
    "LSTMCell": Kind(lambda: nn.LSTMCell(3, 4), lambda: (torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)))),
    "RNNCell": Kind(lambda: nn.RNNCell(3, 4), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "GRUCell": Kind(lambda: nn.GRUCell(3, 4), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "OwnLinear": Kind(lambda: OwnLinear(5, 4), noise(3, 5)),
    "OwnConv": Kind(lambda: OwnConv(3, 4, 3), noise(2, 3, 5, 5)),
    "OwnLSTM": Kind(lambda: OwnLSTM(3, 4), noise(5, 2, 3)),
}


def tensors(out):
    """The tensors in what a layer returns."""
    if isinstance(out, Tensor):
        return [out]
    return [t for part in out if part is not None for t in tensors(part)]


def same(actual, expected):
    """Whether two layers returned the same numbers, to the bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors(actual), tensors(expected), strict=True))
