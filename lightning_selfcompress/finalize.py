"""Plain networks: ordinary torch layers with the quantized weights, no trace of this package."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lightning_selfcompress.checkpoint import take_shapes
from lightning_selfcompress.convert import revert
from lightning_selfcompress.parameters import quantized_parameters

Module = TypeVar("Module", bound=nn.Module)


def finalize(model: Module) -> Module:
    """A copy of a compressed model in plain layers: the same outputs to the bit, and nothing left to learn but weights.

    Args:
        model: A converted module, shrunken or not; a module that was never converted is copied as it is.

    Returns:
        A module of the same class: plain ``nn.Conv2d``, ``nn.Linear`` or whatever the layers were before, of the
        shapes they have now, with dequantized weights. It can be pickled, exported and trained like any other.
    """
    plain = copy.deepcopy(model)
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


def fold_batchnorm(model: nn.Module, *inputs: Any) -> int:
    """Folds batch normalization into the convolutions and linear layers right before it, in place, for evaluation.

    Args:
        model: A plain module, as :func:`finalize` makes it. Its folded normalization becomes ``nn.Identity``.
        inputs: What its ``forward`` takes, to see what follows what, and that nothing has changed.

    Returns:
        Number of layers folded.

    Raises:
        ValueError: If outputs differ afterwards by more than rounding, because a layer's output is used elsewhere too.
            The model is unchanged then.
    """
    training = model.training
    model.eval()
    before = copy.deepcopy(model)
    with torch.no_grad():
        pairs, expected = _neighbours(model, inputs)
        for layer, norm in pairs:
            _fold(layer, norm)
        swapped = {id(norm): nn.Identity() for _, norm in pairs}
        for module in model.modules():
            for name, child in module.named_children():
                if id(child) in swapped:
                    setattr(module, name, swapped[id(child)])
        found = _tensors(model(*inputs))
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(expected, found, strict=True)):
        model.__dict__.update(before.__dict__)
        raise ValueError(
            "Expected the same outputs after folding batch normalization, got others: the output of a layer before one "
            "is used elsewhere as well. Leave this network as it is."
        )
    model.train(training)
    return len(pairs)


def _neighbours(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[tuple[nn.Module, nn.Module]], list[Tensor]]:
    """Layers, each with the normalization that gets its output and is called once; and the network's outputs."""
    made_by: dict[int, nn.Module] = {}
    kept: list[Any] = []  # so that no id is used again
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def made(module: nn.Module, args: Any, out: Any) -> None:
        kept.append(out)
        made_by[id(out)] = module

    def got(module: nn.Module, args: Any) -> None:
        kept.append(args)
        pairs.append((made_by.get(id(args[0]), module), module))

    handles = []
    for module in model.modules():
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
            handles.append(module.register_forward_hook(made))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(got))
    outputs = _tensors(model(*inputs))
    for handle in handles:
        handle.remove()
    once = [p for p in pairs if p[0] is not p[1] and sum(p[0] is a or p[1] is b for a, b in pairs) == 1]
    return once, outputs


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    n = cast(nn.BatchNorm2d, norm)
    weight, bias = fuse(layer.weight, layer.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias)  # type: ignore
    layer.weight, layer.bias = weight, bias


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, list | tuple) else ()
    return [t for value in values for t in _tensors(value)]
