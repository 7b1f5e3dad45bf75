"""Conversion in place: plan (pure, printable), convert, and its inverse revert."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, Skip, _parameter_names, plan_conversion
from lightning_selfcompress.quantize.layers import (
    ChannelAxis,
    Quantized,
    QuantizedSpec,
    _QuantizedRNN,
    is_sharded,
    quantized_class,
)
from lightning_selfcompress.quantize.parameters import quantized_parameters


def convert(model: nn.Module, *, initial_bits: float = 8.0, skip: Skip = ()) -> ConversionPlan:
    """Quantizes every layer it can, in place; ``revert(convert(model))`` is the same model again.

    Layers keep their identity, parameters, hooks and state-dict keys; ``bit_depth`` and ``exponent`` are added to
    each. A layer converted before is not touched. With 8 bits the outputs are those of the float network but for
    8-bit rounding.

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
        if is_sharded(quantized.raw_depth):
            raise ValueError(
                f"Expected a float network to be sharded, got {quantized.name!r}, converted before fully_shard took it "
                f"apart. Shard first, then convert: with SelfCompression in a Trainer, hand over the float network."
            )
    for layer in fresh:
        for weight_name, _ in layer.weights:
            if not bool(torch.isfinite(cast(Tensor, model.get_submodule(layer.name)._parameters[weight_name])).all()):
                raise ValueError(
                    f"Expected finite weights, got NaN or infinity in {f'{layer.name}.{weight_name}'.lstrip('.')!r}. "
                    f"Repair the checkpoint or the initialization, or leave the layer out with skip=."
                )
    shared: dict[int, tuple[QuantizedSpec, nn.Parameter, nn.Parameter]] = _parameters_of(model)
    for layer in fresh:
        _quantize_in_place(model.get_submodule(layer.name), dict(layer.weights), float(initial_bits), shared)
    return plan


def revert(model: nn.Module) -> None:
    """Makes every layer what it was before :func:`convert`: same class, same float parameters, same keys.

    Args:
        model: Any module.
    """
    for layer in list(model.modules()):
        if isinstance(layer, Quantized):
            _swap_out(layer)
            for name in ("release_after_backward", "depths_loaded", "sharded"):
                layer.__dict__.pop(name, None)


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
        for layer, quantized, (specs, parameters) in hidden:
            _swap_in(layer, quantized, specs, parameters)


def _parameters_of(model: nn.Module) -> dict[int, tuple[QuantizedSpec, nn.Parameter, nn.Parameter]]:
    """Id of each latent weight already quantized -> its spec, raw depths and exponents, for weights tied to it."""
    return {
        id(layer.latent(name)): (
            spec,
            cast(nn.Parameter, layer._parameters[spec.bit_depth]),
            cast(nn.Parameter, layer._parameters[spec.exponent]),
        )
        for layer in model.modules()
        if isinstance(layer, Quantized)
        for name, spec in layer._quantized.items()
    }


def _quantize_in_place(
    layer: nn.Module,
    weights: dict[str, ChannelAxis],
    initial_bits: float,
    shared: dict[int, tuple[QuantizedSpec, nn.Parameter, nn.Parameter]],
) -> None:
    specs, parameters, fresh = {}, {}, []
    for name, axis in weights.items():
        weight = cast(nn.Parameter, layer._parameters[name])
        depth_name, exponent_name = _parameter_names(name)
        if id(weight) in shared:
            spec, parameters[depth_name], parameters[exponent_name] = shared[id(weight)]
            specs[name] = replace(spec, bit_depth=depth_name, exponent=exponent_name)
            continue
        counts = weight.numel(), axis.channels(weight)
        specs[name] = QuantizedSpec(depth_name, exponent_name, axis, initial_bits, *counts)
        for key in (depth_name, exponent_name):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            parameters[key] = nn.Parameter(torch.zeros(axis.channels(weight), dtype=dtype, device=weight.device))
        shared[id(weight)] = specs[name], parameters[depth_name], parameters[exponent_name]
        fresh.append(name)
    sharded = any(is_sharded(layer._parameters[name]) for name in weights)  # type: ignore[arg-type]
    _swap_in(layer, quantized_class(type(layer), tuple(specs)), specs, parameters)
    if sharded:
        layer.sharded = True  # type: ignore[assignment]
    for name in fresh:
        cast(Quantized, layer).calibrate(name)


def _swap_in(
    layer: nn.Module,
    quantized: type[Quantized],
    specs: dict[str, QuantizedSpec],
    parameters: dict[str, nn.Parameter],
) -> None:
    for key, parameter in parameters.items():
        layer.register_parameter(key, parameter)
    layer.__dict__["_quantized"], layer.__dict__["_quantized_values"] = specs, {}
    layer.__dict__.pop("_flat_weights", None)
    layer.__class__ = quantized


def _swap_out(layer: Quantized) -> tuple[dict[str, QuantizedSpec], dict[str, nn.Parameter]]:
    """Back to the float class; returns what :func:`_swap_in` needs to undo it."""
    specs: dict[str, QuantizedSpec] = layer.__dict__.pop("_quantized")
    del layer.__dict__["_quantized_values"]
    keys = [key for spec in specs.values() for key in (spec.bit_depth, spec.exponent)]
    parameters = {key: cast(nn.Parameter, layer._parameters.pop(key)) for key in keys}
    recurrent = isinstance(layer, _QuantizedRNN)
    layer.__class__ = layer._float_class  # type: ignore[assignment]
    if recurrent:
        layer._init_flat_weights()  # type: ignore[operator]
    return specs, parameters
