"""Shapes on load: a network takes the shapes of the compressed checkpoint that is loaded into it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.graph import stored_tensors
from lightning_selfcompress.layers import Quantized
from lightning_selfcompress.prune import replace_tensors


def take_shapes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Gives the tensors of a converted module the shapes they have in a state dict, smaller or larger.

    It is a ``load_state_dict`` pre-hook, so that it is at work for every way of loading. A state dict without bit
    depths of this module, that of a float network, changes nothing.

    Args:
        module: A converted module.
        state_dict: What is about to be loaded.
        prefix: Of the module's keys.
    """
    compressed = any(
        prefix + f"{path}.{spec.bit_depth}".lstrip(".") in state_dict
        for path, layer in module.named_modules()
        if isinstance(layer, Quantized)
        for spec in layer._quantized.values()
    )
    if not compressed:
        return
    fresh: dict[int, Tensor] = {}
    for name, tensor in stored_tensors(module).items():
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.dim() == tensor.dim() > 0 and saved.shape != tensor.shape:
            data = torch.zeros(saved.shape, dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            fresh[id(tensor)] = nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data
    if fresh:
        replace_tensors(module, fresh)
