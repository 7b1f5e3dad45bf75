"""Conversion in place: plan (pure, printable), convert, and its inverse revert."""

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
    is_sharded,
    quantized_class,
)
from lightning_selfcompress.quantize.parameters import learned_names, quantized_parameters
from lightning_selfcompress.tensors import name_of


def convert(model: nn.Module, *, initial_bits: float = 8.0, skip: Skip = ()) -> ConversionPlan:
    """Quantizes every layer it can, in place; ``revert(convert(model))`` is the same model again.

    Layers keep their identity, parameters, hooks and state-dict keys; ``bit_depth`` and ``exponent`` are added to
    each, as buffers that require gradients, so that ``model.parameters()`` stays the same list of the same objects. A
    layer converted before is not touched. With 8 bits the outputs equal the outputs of the float network up to
    8-bit rounding.

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
        initial_bits: Bit depth all channels start with, from 2 to 24.
        skip: What to leave in float: module names (``"head"``, with everything inside), patterns
            (``"blocks.*.attn"``) or module types (``nn.Embedding``).

    Returns:
        The plan that was carried out.

    Raises:
        TypeError: If ``skip`` holds something else than strings and module types.
        ValueError: If an entry of ``skip`` matches no module, ``initial_bits`` is out of range, a weight is not
            finite, or bit depths were sharded. The model is then unchanged.
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
    shared = _learned_of(model)
    for layer in fresh:
        _quantize_in_place(model.get_submodule(layer.name), dict(layer.weights), float(initial_bits), shared)
    return plan


def revert(model: nn.Module | ConversionPlan) -> nn.Module:
    """Makes every layer what it was before :func:`convert`: same class, same float parameters, same keys.

    >>> from torch import nn
    >>> from lightning_selfcompress import convert, revert
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> revert(convert(net)) is net
    True
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )

    Args:
        model: Any module, or the plan that :func:`convert` returned for it.

    Returns:
        The module.
    """
    model = model.model if isinstance(model, ConversionPlan) else model
    for layer in list(model.modules()):
        if isinstance(layer, Quantized):
            _swap_out(layer)
            for name in ("release_after_backward", "depths_loaded", "sharded", COUPLING):
                layer.__dict__.pop(name, None)
    return model


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Within this context the model is the float network again; after it, quantized with the same parameters.

    For code that must not notice the conversion, such as ``configure_optimizers``.

    Args:
        model: Any module.
    """
    hidden = [(layer, type(layer), _swap_out(layer)) for layer in list(model.modules()) if isinstance(layer, Quantized)]
    try:
        yield
    finally:
        for layer, quantized, (specs, buffers) in hidden:
            _swap_in(layer, quantized, specs, buffers)


Learned = tuple[QuantizedSpec, Tensor, Tensor]  # how a weight is quantized, its raw depths, its exponents


def _learned_of(model: nn.Module) -> dict[int, Learned]:
    """What is learned of each latent weight already quantized, by the weight's id, for weights tied to it."""
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
    """Back to the float class; returns what :func:`_swap_in` needs to undo it."""
    specs: dict[str, QuantizedSpec] = layer.__dict__.pop("_quantized")
    del layer.__dict__["_quantized_values"]
    keys = [key for spec in specs.values() for key in (spec.bit_depth, spec.exponent)]
    buffers = {key: cast(Tensor, layer._buffers.pop(key)) for key in keys}
    recurrent = isinstance(layer, _QuantizedRNN)
    layer.__class__ = layer._float_class  # type: ignore[assignment]
    if recurrent:
        layer._init_flat_weights()  # type: ignore[operator]
    return specs, buffers
