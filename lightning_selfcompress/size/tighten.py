"""Bit depths brought down to what the codes of channels use."""

import torch
from torch import nn

from lightning_selfcompress.size.model_bytes import ModelBytes


@torch.no_grad()
def tighten(model: nn.Module) -> None:
    """Brings bit depths down to ranges that leave room for one more step beyond each channel's codes.

    No code at a living input changes, and no weight there comes to lie outside its range. A price of codes leaves
    depths where they are, as smaller codes leave the ends of their range; so depths follow from time to time. Dead
    channels stay dead.

    >>> import torch
    >>> from lightning_selfcompress import convert
    >>> from lightning_selfcompress.size.tighten import tighten
    >>> layer = convert(torch.nn.Linear(2, 1)).model
    >>> layer.exponent.data.zero_()  # steps of 1
    tensor([0.])
    >>> layer.latent("weight").data.copy_(torch.tensor([[2.0, -1.0]]))
    tensor([[ 2., -1.]])
    >>> tighten(layer)
    >>> layer.bit_depth.tolist()  # codes from -4 to 3
    [3.0]

    Args:
        model: A converted module.
    """
    price = ModelBytes.of(model)
    if not price.parameters:
        return
    for p, (value, known) in zip(price.parameters, price.living()[0], strict=True):
        if not value.numel():
            continue
        within = tuple(d for d, n in enumerate(known.scale.shape) if n == 1)
        codes = (value * known.inverse).round_()
        high, low = (codes.amax(within), codes.amin(within)) if within else (codes, codes)
        half = torch.maximum(high.flatten() + 2, 1 - low.flatten()).clamp(min=1)
        p.raw_depth.copy_(torch.where(p.raw_depth > 0, torch.minimum(p.raw_depth, half.log2() + 1), p.raw_depth))
