"""Plain networks: ordinary torch layers with the quantized weights, no trace of this package."""

from typing import TypeVar, cast

import torch
from torch import nn

from lightning_selfcompress.files.checkpoint import take_shapes
from lightning_selfcompress.quantize.convert import revert
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.tensors import copy_module

Module = TypeVar("Module", bound=nn.Module)


def finalize(model: Module) -> Module:
    """A copy of a compressed model in plain layers: the same outputs to the bit, without bit depths or exponents.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert, finalize
    >>> net, x = nn.Linear(6, 4), torch.randn(2, 6)
    >>> plan = convert(net)
    >>> plain = finalize(net)
    >>> type(plain).__name__, torch.equal(plain(x), net(x))
    ('Linear', True)

    Args:
        model: A converted module, shrunken or not; a module that was never converted is simply copied.

    Returns:
        A module of the same class: plain ``nn.Conv2d``, ``nn.Linear`` or whatever the layers were before, of the
        shapes they have now, with dequantized weights. It can be pickled, exported and trained like any other.
    """
    plain = cast(Module, copy_module(model))
    with torch.no_grad():
        for p in quantized_parameters(plain):
            p.latent.copy_(getattr(p.layer, p.weight_name))
    make_plain(plain)
    return plain


def make_plain(model: nn.Module) -> None:
    """Takes off whatever this package has put on a module, in place: quantized classes, hooks, notes."""
    revert(model)
    for module in model.modules():
        module.__dict__.pop("_removed_nbytes", None)
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "hook", None) is take_shapes]:
            del hooks[key]
