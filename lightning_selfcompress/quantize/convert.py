"""The conversion of a model in place, :func:`convert`, and its inverse, :func:`revert`."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.conversion_plan import Axes, ConversionPlan, Skip, plan_conversion
from lightning_selfcompress.quantize.layers import COUPLING, Quantized, QuantizedSpec, _QuantizedRNN
from lightning_selfcompress.quantize.parameters import USES, learned_names, quantized_parameters
from lightning_selfcompress.quantize.quantized_class import quantized_class
from lightning_selfcompress.quantize.registry import is_told_by_torch
from lightning_selfcompress.tensors import is_sharded, name_of


def convert(
    model: nn.Module, *, initial_bits: float = 8.0, skip: Skip = (), axes: Axes | None = None
) -> ConversionPlan:
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
        axes: The axes of weights whose layer types are not known: name of a parameter -> its :class:`ChannelAxis`, or
            a reason for which it stays in float. :func:`register_layer` says it for a whole class.

    Returns:
        The plan that was carried out.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string nor a module type.
        ValueError: If an entry of ``skip`` matches no module, an axis does not fit its parameter, ``initial_bits`` is
            out of range, a weight is not finite, or FSDP2 sharded the model after an earlier conversion.

    Whatever is raised, the model is unchanged then.
    """
    if not 2 <= initial_bits <= 24:
        raise ValueError(f"Expected initial_bits from 2 to 24, got {initial_bits!r}.")
    plan = plan_conversion(model, skip=skip, axes=axes)
    for quantized in quantized_parameters(model):
        if is_sharded(quantized.latent) and not quantized.layer.sharded:
            raise ValueError(
                f"Expected a float network to be sharded, got {quantized.name!r}, converted before fully_shard took it "
                f"apart. Shard first, then convert: with SelfCompression in a Trainer, hand over the float network."
            )
    fresh: list[tuple[nn.Module, dict[str, ChannelAxis]]] = []
    for planned in plan.compressed:
        layer = model.get_submodule(planned.name)
        done = layer._quantized if isinstance(layer, Quantized) else {}
        if done.keys() != dict(planned.weights).keys():
            fresh.append((layer, dict(planned.weights)))
        for name in dict(planned.weights).keys() - done.keys():
            if not bool(torch.isfinite(cast(Tensor, layer._parameters[name])).all()):
                raise ValueError(
                    f"Expected finite weights, got NaN or infinity in {name_of(planned.name, name)!r}. "
                    f"Repair the checkpoint or the initialization, or leave the layer out with skip=."
                )
    shared = _learned_of(model)
    before = [(layer, _content(layer)) for layer, _ in fresh]
    try:
        for layer, weights in fresh:
            _quantize_in_place(layer, weights, float(initial_bits), shared)
    except BaseException:
        for layer, content in before:
            _put_back(layer, content)
        raise
    return plan


Content = tuple[type[nn.Module], dict[str, Any]]  # of a module: its class, and its attributes with their tables


def _content(layer: nn.Module) -> Content:
    """Returns all of a layer that a conversion changes."""
    return type(layer), {name: copy(v) if isinstance(v, dict | set) else v for name, v in vars(layer).items()}


def _put_back(layer: nn.Module, content: Content) -> None:
    """Gives a layer the class and the attributes that it had, where a conversion has failed."""
    object.__setattr__(layer, "__class__", content[0])
    for name, value in content[1].items():
        table: Any = vars(layer).get(name)
        if isinstance(value, dict | set) and type(table) is type(value):
            table.clear()
            table.update(value)
        else:
            vars(layer)[name] = value
    for name in vars(layer).keys() - content[1].keys():
        del vars(layer)[name]


def revert(model: nn.Module | ConversionPlan) -> nn.Module:
    """Turns every quantized layer back into its float class, with the same parameters and state-dict keys.

    Activations that are quantized stay so; ``lightning_selfcompress.activations.remove_activations`` ends it.

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
            revert_layer(layer)
    return model


def revert_layer(layer: Quantized) -> None:
    """Turns one quantized layer back into its float class."""
    _swap_out(layer)
    for name in ("release_after_backward", "depths_loaded", "pristine", "sharded", COUPLING, USES):
        layer.__dict__.pop(name, None)


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
    specs, buffers = _swap_out(layer) if isinstance(layer, Quantized) else ({}, {})
    fresh = []
    for name, axis in ((name, axis) for name, axis in weights.items() if name not in specs):
        weight = cast(nn.Parameter, layer._parameters[name])
        depth_name, exponent_name = learned_names(name)
        if id(weight) not in shared:
            channels, dtype = axis.channels(weight), torch.promote_types(weight.dtype, torch.float32)
            spec = QuantizedSpec(depth_name, exponent_name, axis, initial_bits, weight.numel(), channels)
            learned = torch.zeros(2, channels, dtype=dtype, device=weight.device)
            shared[id(weight)] = (spec, *(t.clone().requires_grad_() for t in learned))
            fresh.append(name)
        spec, buffers[depth_name], buffers[exponent_name] = shared[id(weight)]
        saved = not is_told_by_torch(layer, name)
        specs[name] = replace(spec, bit_depth=depth_name, exponent=exponent_name, saves_axis=saved)
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
        nn.Module.register_buffer(layer, key, buffer)  # a class may have a method of its own of this name
    layer.__dict__["_quantized"], layer.__dict__["_quantized_values"] = specs, {}
    layer.__dict__.pop("_flat_weights", None)
    object.__setattr__(layer, "__class__", quantized)  # past a ``__setattr__`` of the layer's own class


def _swap_out(layer: Quantized) -> tuple[dict[str, QuantizedSpec], dict[str, Tensor]]:
    """Gives a layer its float class back; returns the specs and buffers that :func:`_swap_in` needs to undo this."""
    buffers = {key: cast(Tensor, layer._buffers.pop(key)) for key in layer.learned_names()}
    specs: dict[str, QuantizedSpec] = layer.__dict__.pop("_quantized")
    del layer.__dict__["_quantized_values"]
    recurrent = isinstance(layer, _QuantizedRNN)
    object.__setattr__(layer, "__class__", layer._float_class)
    if recurrent:
        layer._init_flat_weights()  # type: ignore[operator]
    return specs, buffers
