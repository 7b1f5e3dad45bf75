"""Widths that a user's layer keeps in attributes of its own, such as ``nf`` or ``hidden_dim``, beside its tensors."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import attributes_of

Shapes = Mapping[str, tuple[int, ...]]


_WIDTH = re.compile(
    r"(^|_)(n?(features?|channels?|dims?|widths?|units|hidden|sizes?|ch|feats?|planes)|nf|nx|nin|nout)$"
    r"|(^|_)(n|num|f|c|d|ch|dim)_(in|out|inputs?|outputs?)$|^d_(model|ff|inner)$",
    re.IGNORECASE,
)


_OTHER = re.compile(r"(batch|kernel|window|patch|vocab|image|img|chunk|block|step|head|pool|grid|group|memory)")


_OUT = re.compile(r"(^|_)n?(out|outputs?|f)(_|$)|^nf$|^nout$")


_IN = re.compile(r"(^|_)n?(in|inputs?|x)(_|$)|^nx$|^nin$")


def own_shapes(module: nn.Module) -> Shapes:
    """Returns the shapes of a module's own parameters."""
    return {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}


def bring_widths_along(module: nn.Module, before: Shapes, axes: Mapping[str, ChannelAxis]) -> None:
    """Sets the attributes of a layer that hold the sizes of dimensions which have become smaller.

    An attribute with the name of a width is one if it has the size that a dimension had: of all dimensions that had
    this size where these are of one size still, else of the output channels or of the inputs where it is named so. What
    is not found that way, or wrongly, a dry run refutes.

    Args:
        module: A layer whose type torch does not define.
        before: The shapes of its parameters before.
        axes: The axes of its weights, for the layers that are not quantized.
    """
    float_class = module._float_class if isinstance(module, Quantized) else type(module)
    if float_class.__module__.startswith("torch."):
        return
    own = {n: spec.axis for n, spec in module._quantized.items()} if isinstance(module, Quantized) else axes
    after = own_shapes(module)
    sizes = [
        (size, after[name][d], d == own[name].dim if name in own and len(shape) > 1 else None)
        for name, shape in before.items()
        if name in after and len(after[name]) == len(shape)
        for d, size in enumerate(shape)
    ]
    for name, value in list(attributes_of(module)):
        if is_width(name, value):
            found = {now for size, now, _ in sizes if size == value}
            if len(found) > 1:
                found = {now for size, now, makes in sizes if size == value and makes is _side(name)}
            if len(found) == 1:
                setattr(module, name, found.pop())


def is_width(name: str, value: Any) -> bool:
    """Returns whether an attribute is a whole number with the name of a width."""
    return type(value) is int and bool(_WIDTH.search(name)) and not _OTHER.search(name)


def _side(name: str) -> bool | str:
    """Returns whether an attribute is named after outputs (True) or inputs (False)."""
    out, into = bool(_OUT.search(name)), bool(_IN.search(name))
    return out if out != into else "neither"
