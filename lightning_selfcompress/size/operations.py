"""The price in operations: a weight costs as often as one inference uses it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import USES, QuantizedParameter, quantized_parameters
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.tensors import tensors_in


@contextmanager
def counting_uses(model: nn.Module) -> Iterator[dict[str, float]]:
    """Counts how often each quantized weight is used while a model runs within this context.

    A weight is used as often as its layer multiplies, divided by the number of the layer's weights. A recurrent layer,
    whose products torch does not show on all devices, uses a weight once for each element of its sequences. What the
    quantized layers inside a layer multiply is theirs. A layer whose ``forward`` is not what uses its weights, such as
    a list of parameters, is left out.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert
    >>> from lightning_selfcompress.size.operations import counting_uses
    >>> net = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))).model
    >>> with counting_uses(net) as uses:
    ...     out = net(torch.randn(2, 1, 6, 6))
    >>> uses  # two images, of which each has 16 positions
    {'0.weight': 32.0, '2.weight': 2.0}

    Args:
        model: A converted model.

    Yields:
        The uses of each weight by its name, which are there when the context ends.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Quantized)}
    products: dict[int, float] = {}
    handles = []
    running: list[list[int]] = []  # of each layer that runs: the products before it, and those of the layers inside it
    with FlopCounterMode(display=False) as counter:

        def before(layer: Any, inputs: Any) -> None:
            running.append([counter.get_total_flops(), 0])

        def after(layer: Any, inputs: Any, outputs: Any) -> None:
            start, inside = running.pop()
            total = counter.get_total_flops() - start
            flops = total - inside
            if running:
                running[-1][1] += total
            elements = sum(t.numel() // max(t.shape[-1], 1) for t in tensors_in(inputs)[:1] if t.dim())
            numel = sum(layer.latent(name).numel() for name in layer._quantized)
            products[id(layer)] = products.get(id(layer), 0.0) + (flops / 2 or elements * numel)

        for layer in layers.values():
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        uses: dict[str, float] = {}
        try:
            yield uses
        finally:
            for handle in handles:
                handle.remove()
    owners = {path: _runner(path, layers, products) for path in layers}  # attention runs its output layer itself
    numel: dict[int, int] = {}
    for path, layer in layers.items():
        owner = id(owners[path])
        numel[owner] = numel.get(owner, 0) + sum(layer.latent(name).numel() for name in layer._quantized)
    of_layer = {id(layer): id(owners[path]) for path, layer in layers.items()}
    for p in quantized_parameters(model):
        owner = of_layer[id(p.layer)]
        if p.spec.saves_axis and owner not in products:
            continue
        uses[p.name] = products.get(owner, 0.0) / max(numel[owner], 1)


def _runner(path: str, layers: Mapping[str, Quantized], products: Mapping[int, float]) -> Quantized:
    """Returns the layer that has multiplied with a layer's weights: itself, or the layer that it is a part of."""
    parent = path
    while id(layers[path]) not in products and parent:
        parent = parent.rpartition(".")[0]
        if parent in layers and id(layers[parent]) in products:
            return layers[parent]
    return layers[path]


def note_uses(model: nn.Module, uses: dict[str, float], samples: int) -> None:
    """Notes on every quantized layer how often one inference uses its weights.

    Args:
        model: A converted model.
        uses: The uses of each weight, from :func:`counting_uses`.
        samples: Number of samples that were run.
    """
    for p in quantized_parameters(model):
        if p.name in uses:
            p.layer.__dict__.setdefault(USES, {})[p.weight_name] = uses[p.name] / samples


def uses_of(parameter: QuantizedParameter) -> float | None:
    """Returns how often one inference uses a weight; None if that is not known."""
    found: float | None = parameter.layer.__dict__.get(USES, {}).get(parameter.weight_name)
    return found


def model_operations(model: nn.Module) -> ModelSize:
    """Makes the price in bit operations of a converted model.

    With u_l the uses of the weights of layer l and z_l its size, see :class:`ModelSize`, the price is
    ``sum_l u_l z_l / sum_l u_l N_l``: learned bits per multiplication. Early convolutions, whose weights are few and
    used often, are paid for as they cost. Weights whose uses are not known count as those that are used once.

    Args:
        model: A module.
    """
    size = ModelSize.of(model)
    if not size.parameters:
        return size
    uses = [uses_of(p) for p in size.parameters]
    known = [1.0 if u is None else u for u in uses]
    total = sum(u * p.spec.original_numel for u, p in zip(known, size.parameters, strict=True))
    share = [u * size.original_numel / total if total else 1.0 for u in known]
    factors: Tensor = torch.cat(
        [size.n.new_full((p.channels,), s) for s, p in zip(share, size.parameters, strict=True)]
    )
    return replace(size, n=size.n * factors)
