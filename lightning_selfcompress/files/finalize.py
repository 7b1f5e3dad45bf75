"""Plain networks: ordinary torch layers that hold the quantized weights and nothing of this package."""

from typing import TypeVar, cast

import torch
from torch import nn

from lightning_selfcompress.files.checkpoint import take_shapes
from lightning_selfcompress.quantize.convert import revert
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.tensors import copy_module

Module = TypeVar("Module", bound=nn.Module)


def finalize(model: Module) -> Module:
    """Returns a copy of a compressed model with plain layers, whose outputs equal the model's outputs to the bit.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert, finalize
    >>> net = convert(nn.Linear(6, 4)).model
    >>> plain = finalize(net)
    >>> plain, plain.weight.equal(net.weight)
    (Linear(in_features=6, out_features=4, bias=True), True)

    Args:
        model: A converted module, with or without removals. A module that was never converted is only copied.

    Returns:
        A module of the same class, without bit depths and exponents. Its layers have the classes from before the
        conversion, such as ``nn.Conv2d`` and ``nn.Linear``, the present shapes, and dequantized weights. The module can
        be pickled, exported and trained like any other.
    """
    plain = cast(Module, copy_module(model))
    with torch.no_grad():
        for p in quantized_parameters(plain):
            p.latent.copy_(getattr(p.layer, p.weight_name))
    make_plain(plain)
    return plain


def make_plain(model: nn.Module) -> None:
    """Removes from a module, in place, everything that this package has added: quantized classes, hooks and notes."""
    revert(model)
    for module in model.modules():
        module.__dict__.pop("_removed_nbytes", None)
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "hook", None) is take_shapes]:
            del hooks[key]
