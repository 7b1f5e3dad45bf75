"""Biases, normalization and other vectors left in float, rounded to a byte a value."""

from typing import cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.packing import is_vector, rounded
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.running_statistics import with_statistics
from lightning_selfcompress.tensors import stored_tensors


def vectors_of(model: nn.Module) -> list[Tensor]:
    """Returns the vectors of a model that are neither quantized nor learned along with quantized weights.

    Args:
        model: A converted module.
    """
    learned = learned_tensors(model)
    stored = stored_tensors(model, transient=False).values()
    return [tensor for tensor in stored if id(tensor) not in learned and is_vector(tensor)]


@torch.no_grad()
def round_vectors(model: nn.Module) -> None:
    """Rounds the vectors of a model to values that a packed file holds in a byte each.

    Batch normalization computes ``w (x - mean) / sqrt(var + eps) + b``. Where its variance is small, an error of the
    mean is a large one of the result. So mean and variance are rounded first, and scale and shift then make up for it,
    before they are rounded themselves. In training mode, where the batch's own statistics are used, the function
    changes by what they make up for.

    Args:
        model: A converted module.
    """
    for layer in with_statistics(model).values():
        _round_statistics(layer)
    for tensor in vectors_of(model):
        tensor.copy_(rounded(tensor))


def _round_statistics(layer: nn.Module) -> None:
    mean, var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if not is_vector(mean) or weight is None or bias is None:
        return
    eps = float(cast(float, layer.eps))
    scale = weight / (var + eps).sqrt()
    shift = bias - scale * mean
    mean.copy_(rounded(mean))
    var.copy_(rounded(var))
    weight.copy_(rounded(scale * (var + eps).sqrt()))
    bias.copy_(rounded(shift + weight / (var + eps).sqrt() * mean))
