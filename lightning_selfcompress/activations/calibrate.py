"""Quantized activations without training: exponents from what a network computes on some batches."""

import warnings
from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_selfcompress.activations.formula import LEAST_BITS, MOST_BITS
from lightning_selfcompress.activations.layers import OUTPUT, Point, put_points, remove_activations
from lightning_selfcompress.activations.places import Places, Seen, find_points, layers_left
from lightning_selfcompress.tensors import tensors_in

Module = TypeVar("Module", bound=nn.Module)


def check_bits(bits: Any) -> int:
    """Returns a bit depth of activations, or raises a ValueError that says what is accepted."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(
            f"Expected activations in a whole number of bits from {LEAST_BITS} to {MOST_BITS}, got {bits!r}. "
            f"Integer kernels compute with 8."
        )
    return bits


def calibrate_activations(model: Module, batches: Iterable[Any], *, bits: int = 8) -> Module:
    """Has a trained network quantize its activations, in place, by what it computes on some batches.

    It is for networks that were trained without ``SelfCompression(activations=8)``, which costs less accuracy. The
    points are those of the training, and each step size is the one of least squared error on the batches.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import calibrate_activations
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(16, 4)
    >>> before = net(x)
    >>> net = calibrate_activations(net, [x])
    >>> bool((net(x) - before).abs().max() < 0.05)
    True

    Args:
        model: A network, converted or plain, such as :func:`load` returns. It is run in evaluation mode.
        batches: Batches of inputs, each a tensor, a tuple or list of arguments of ``forward``, or a dictionary of
            keyword arguments; of a list that is longer than what ``forward`` takes, as with labels, the first ones are
            taken. A hundred examples are enough.
        bits: Bit depth of all activations, from 2 to 8.

    Returns:
        The network.

    Raises:
        ValueError: If ``bits`` is out of its range, there is no batch, the network does not take a batch, computes
            nothing finite from it, or has no linear layer and no convolution whose input could be quantized.
    """
    check_bits(bits)
    remove_activations(model)
    modes = [(module, module.training) for module in model.modules()]
    found: Places = {}
    count = 0
    try:
        model.eval()
        with torch.no_grad():
            for count, batch in enumerate(batches, 1):  # noqa: B007
                for place, seen in find_points(model, lambda batch=batch: _call(model, batch)).items():  # type: ignore[misc]
                    found.setdefault(place, Seen()).join(seen)
    finally:
        for module, mode in modes:
            module.training = mode
    if not count:
        raise ValueError("Expected batches to calibrate activations with, got none.")
    if not found:
        raise ValueError(
            f"Expected a network with linear layers or convolutions whose inputs are activations, found none in this "
            f"{type(model).__name__}."
        )
    for (path, where), seen in found.items():
        if not any(len(part) for part in seen.samples):
            raise ValueError(f"Expected finite activations, got none at the {where} of {path!r}. Look at the batches.")
    put_points(model, points_of(found, bits))
    if left := layers_left(model):
        warnings.warn(f"What these read stays in float, as they have a forward of their own: {left}.", stacklevel=2)
    return model


Points = dict[str, tuple[tuple[Point, float], ...]]  # path of a module -> its points, each with its exponent


def points_of(places: Places, bits: int) -> Points:
    """Returns the points of some places, with their exponents, by the paths of their modules."""
    found: Points = {}
    for (path, where), seen in sorted(places.items(), key=lambda item: item[0][1] == OUTPUT):
        found[path] = (*found.get(path, ()), seen.point(where, bits))
    return found


def _call(model: nn.Module, batch: Any) -> None:
    arguments = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    parameters = signature(model.forward).parameters
    takes = [p for p in parameters.values() if p.kind is not Parameter.KEYWORD_ONLY]
    named = {}
    takes_any_name = any(p.kind is Parameter.VAR_KEYWORD for p in takes)
    if isinstance(batch, Mapping) and (takes_any_name or batch.keys() <= parameters.keys()):
        arguments, named = (), dict(batch)
    if all(p.kind is not Parameter.VAR_POSITIONAL for p in takes):
        arguments = arguments[: len([p for p in takes if p.kind is not Parameter.VAR_KEYWORD])]
    try:
        model(*arguments, **named)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in((arguments, named))) or "no tensors"
        raise ValueError(
            f"Expected batches that {type(model).__name__}.forward() takes, got {shapes}: {type(error).__name__}: "
            f"{error}."
        ) from error
