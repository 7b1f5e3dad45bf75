"""The rate of integer codes: what a channel's codes cost in an entropy-coded file, as a function of their magnitude."""

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)
_LEAST = 1e-6  # mean magnitude: below it a channel has no code but 0


def code_rate(m: Tensor) -> Tensor:
    """Returns the entropy of a code in a channel whose codes have the mean magnitude ``m``, in bits.

    Codes of a channel are close to two-sided geometric, ``p(c) ~ theta^|c|``, the distribution of the largest entropy
    for a mean magnitude. With ``m = 2 theta / (1 - theta^2)`` its entropy is::

        H(m) = -log2((1 - theta) / (1 + theta)) - m log2(theta) = (asinh(m) + m asinh(1 / m)) / ln 2

    >>> import torch
    >>> from lightning_selfcompress.size.rate import code_rate
    >>> [round(bits, 2) for bits in code_rate(torch.tensor([0.0, 0.1, 1.0, 100.0])).tolist()]
    [0.0, 0.58, 2.54, 9.09]

    Args:
        m: Mean magnitudes of the codes of channels, >= 0, any shape.

    Returns:
        Bits a code, of the shape of ``m``.
    """
    m = m.clamp(min=_LEAST)
    return (torch.asinh(m) + m * torch.asinh(1 / m)) / LN2


def rate_slope(m: Tensor) -> Tensor:
    """Returns ``dH/dm = asinh(1 / m) / ln 2 = -log2(theta)``, the bits that one more step of magnitude costs.

    >>> import torch
    >>> from lightning_selfcompress.size.rate import rate_slope
    >>> [round(bits, 2) for bits in rate_slope(torch.tensor([0.01, 1.0, 100.0])).tolist()]
    [7.64, 1.27, 0.01]

    Args:
        m: Mean magnitudes of the codes of channels, >= 0, any shape.

    Returns:
        Bits, of the shape of ``m``.
    """
    return torch.asinh(1 / m.clamp(min=_LEAST)) / LN2


def zero_rate(m: Tensor) -> Tensor:
    """Returns what a code 0 costs in a channel whose codes have the mean magnitude ``m``, ``asinh(m) / ln 2`` bits.

    It is what a channel's rate falls by with each weight that goes and was zero: ``H(m) - m dH/dm``.

    >>> import torch
    >>> from lightning_selfcompress.size.rate import zero_rate
    >>> [round(bits, 2) for bits in zero_rate(torch.tensor([0.0, 0.1, 1.0])).tolist()]
    [0.0, 0.14, 1.27]

    Args:
        m: Mean magnitudes of the codes of channels, >= 0, any shape.

    Returns:
        Bits, of the shape of ``m``.
    """
    return torch.asinh(m) / LN2


def counted_rate(
    n: Tensor,  # (channels,)
    nonzero: Tensor,  # (channels,)
    total: Tensor,  # (channels,)
) -> Tensor:
    """Returns the bits of the codes of channels whose zeros are counted apart, ``(channels,)``.

    With k of n codes that are not zero, of mean magnitude mu = S / k, and magnitudes that are geometric from 1 on::

        n h(k / n) + k (1 + mu log2(mu) - (mu - 1) log2(mu - 1)),    h(p) = -p log2(p) - (1 - p) log2(1 - p)

    For two-sided geometric codes it is ``n H(S / n)``; it is less where zeros are more than their share, as in a
    convolution some of whose kernel never meets an image.

    >>> import torch
    >>> from lightning_selfcompress.size.rate import counted_rate
    >>> counted_rate(torch.tensor([100.0]), torch.tensor([10.0]), torch.tensor([10.0])).round().tolist()
    [57.0]

    Args:
        n: Number of codes.
        nonzero: Number k of codes that are not zero.
        total: Sum S of the magnitudes.
    """
    mean = total / nonzero.clamp(min=1)
    share = nonzero / n.clamp(min=1)
    places = -n * (_x_log2(share) + _x_log2(1 - share))
    return places + nonzero * (1 + _x_log2(mean) - _x_log2((mean - 1).clamp(min=0)))


def channel_rate(codes: Tensor) -> Tensor:
    """Returns what a code of each channel takes in an entropy-coded file, in bits, by :func:`counted_rate`.

    >>> import torch
    >>> from lightning_selfcompress.size.rate import channel_rate
    >>> channel_rate(torch.tensor([[1, -1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])).tolist()
    [1.0, 1.5, 0.0]

    Args:
        codes: The codes of channels, whole numbers of any dtype, ``(channels, weights per channel)``.

    Returns:
        Bits a weight, ``(channels,)``, float32.
    """
    magnitudes = codes.abs().float()
    n = magnitudes.new_full((len(codes),), codes.shape[1])
    return counted_rate(n, magnitudes.count_nonzero(1).float(), magnitudes.sum(1)) / n.clamp(min=1)


def _x_log2(x: Tensor) -> Tensor:
    return torch.xlogy(x, x) / LN2
