"""The conversion of a model in place, :func:`convert`, and its inverse, :func:`revert`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, Skip, plan_conversion
from lightning_selfcompress.quantize.layers import (
    COUPLING,
    ChannelAxis,
    Quantized,
    QuantizedSpec,
    _QuantizedRNN,
)
from lightning_selfcompress.quantize.parameters import USES, learned_names, quantized_parameters
from lightning_selfcompress.quantize.quantized_class import quantized_class
from lightning_selfcompress.tensors import is_sharded, name_of


def convert(model: nn.Module, *, initial_bits: float = 8.0, skip: Skip = ()) -> ConversionPlan:
    """Quantizes in place every layer that can be quantized; :func:`revert` undoes the conversion.

    Each layer keeps its identity, its parameters, its hooks and its state-dict keys. Raw bit depths and exponents are
    added to the layer as buffers that require gradients, so ``model.parameters()`` stays the same list of the same
    objects. A layer that is already quantized is not changed. With 8 bits, the outputs equal the outputs of the float
    network up to 8-bit rounding.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> parameters = list(net.parameters())
    >>> print(convert(net))
    Compressed: 18 weights in 2 layers (2 Linear)
    >>> all(a is b for a, b in zip(net.parameters(), parameters))
    True
    >>> net[0].bit_depth.tolist()
    [8.0, 8.0, 8.0]

    Args:
        model: Any module.
        initial_bits: Bit depth of all channels at the start, from 2 to 24.
        skip: The modules that stay in float, with all their submodules: module names (``"head"``), patterns
            (``"blocks.*.attn"``) or module types (``nn.Embedding``).

    Returns:
        The plan that was carried out.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string nor a module type.
        ValueError: If an entry of ``skip`` matches no module, ``initial_bits`` is out of range, a weight is not
            finite, or FSDP2 sharded the model after an earlier conversion. The model is then unchanged.
    """
    if not 2 <= initial_bits <= 24:
        raise ValueError(f"Expected initial_bits from 2 to 24, got {initial_bits!r}.")
    plan = plan_conversion(model, skip=skip)
    fresh = [layer for layer in plan.compressed if not isinstance(model.get_submodule(layer.name), Quantized)]
    for quantized in quantized_parameters(model):
        if is_sharded(quantized.latent) and not quantized.layer.sharded:
            raise ValueError(
                f"Expected a float network to be sharded, got {quantized.name!r}, converted before fully_shard took it "
                f"apart. Shard first, then convert: with SelfCompression in a Trainer, hand over the float network."
            )
    for layer in fresh:
        for weight_name, _ in layer.weights:
            if not bool(torch.isfinite(cast(Tensor, model.get_submodule(layer.name)._parameters[weight_name])).all()):
                raise ValueError(
                    f"Expected finite weights, got NaN or infinity in {name_of(layer.name, weight_name)!r}. "
                    f"Repair the checkpoint or the initialization, or leave the layer out with skip=."
                )
    for layer in fresh:  # a class that cannot be made raises before anything is changed
        quantized_class(type(model.get_submodule(layer.name)), tuple(name for name, _ in layer.weights))
    shared = _learned_of(model)
    for layer in fresh:
        _quantize_in_place(model.get_submodule(layer.name), dict(layer.weights), float(initial_bits), shared)
    return plan


def revert(model: nn.Module | ConversionPlan) -> nn.Module:
    """Turns every quantized layer back into its float class, with the same parameters and state-dict keys.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert, revert
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> revert(convert(net)) is net
    True
    >>> net[0], list(net[0].state_dict())
    (Linear(in_features=4, out_features=3, bias=True), ['weight', 'bias'])

    Args:
        model: Any module, or the plan that :func:`convert` returned for the module.

    Returns:
        The module.
    """
    model = model.model if isinstance(model, ConversionPlan) else model
    for layer in list(model.modules()):
        if isinstance(layer, Quantized):
            _swap_out(layer)
            for name in ("release_after_backward", "depths_loaded", "pristine", "sharded", COUPLING, USES):
                layer.__dict__.pop(name, None)
    return model


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Makes the model the float network within this context, and quantizes the same parameters again after it.

    The context is for code that must not notice the conversion, such as ``configure_optimizers``.

    Args:
        model: Any module.
    """
    hidden = [(layer, type(layer), _swap_out(layer)) for layer in list(model.modules()) if isinstance(layer, Quantized)]
    try:
        yield
    finally:
        for layer, quantized, (specs, buffers) in hidden:
            _swap_in(layer, quantized, specs, buffers)


Learned = tuple[QuantizedSpec, Tensor, Tensor]  # of one weight: its spec, raw bit depths and exponents


def _learned_of(model: nn.Module) -> dict[int, Learned]:
    """Maps the id of each quantized latent weight to its spec, depths and exponents, which tied weights share."""
    return {id(p.latent): (p.spec, *p.learned) for p in quantized_parameters(model)}


def _quantize_in_place(
    layer: nn.Module, weights: dict[str, ChannelAxis], initial_bits: float, shared: dict[int, Learned]
) -> None:
    specs, buffers, fresh = {}, {}, []
    for name, axis in weights.items():
        weight = cast(nn.Parameter, layer._parameters[name])
        depth_name, exponent_name = learned_names(name)
        if id(weight) not in shared:
            channels, dtype = axis.channels(weight), torch.promote_types(weight.dtype, torch.float32)
            spec = QuantizedSpec(depth_name, exponent_name, axis, initial_bits, weight.numel(), channels)
            learned = torch.zeros(2, channels, dtype=dtype, device=weight.device)
            shared[id(weight)] = (spec, *(t.clone().requires_grad_() for t in learned))
            fresh.append(name)
        spec, buffers[depth_name], buffers[exponent_name] = shared[id(weight)]
        specs[name] = replace(spec, bit_depth=depth_name, exponent=exponent_name)
    sharded = any(is_sharded(layer._parameters[name]) for name in weights)  # type: ignore[arg-type]
    _swap_in(layer, quantized_class(type(layer), tuple(specs)), specs, buffers)
    if sharded:
        layer.sharded = True  # type: ignore[assignment]
    for name in fresh:
        cast(Quantized, layer).calibrate(name)


def _swap_in(
    layer: nn.Module, quantized: type[Quantized], specs: dict[str, QuantizedSpec], buffers: dict[str, Tensor]
) -> None:
    for key, buffer in buffers.items():
        layer.register_buffer(key, buffer)
    layer.__dict__["_quantized"], layer.__dict__["_quantized_values"] = specs, {}
    layer.__dict__.pop("_flat_weights", None)
    layer.__class__ = quantized


def _swap_out(layer: Quantized) -> tuple[dict[str, QuantizedSpec], dict[str, Tensor]]:
    """Gives a layer its float class back; returns the specs and buffers that :func:`_swap_in` needs to undo this."""
    buffers = {key: cast(Tensor, layer._buffers.pop(key)) for key in layer.learned_names()}
    specs: dict[str, QuantizedSpec] = layer.__dict__.pop("_quantized")
    del layer.__dict__["_quantized_values"]
    recurrent = isinstance(layer, _QuantizedRNN)
    layer.__class__ = layer._float_class  # type: ignore[assignment]
    if recurrent:
        layer._init_flat_weights()  # type: ignore[operator]
    return specs, buffers
