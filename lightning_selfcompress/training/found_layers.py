"""Layers of unknown types, found by what they do in a training step that is run on a copy before the first one."""

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_selfcompress.channels.weight_roles import NOT_SEEN, WeightRoles
from lightning_selfcompress.files.checkpoint import axes_in
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, unmatched
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.tensors import copy_module, name_of
from lightning_selfcompress.training.messages import tell, warn
from lightning_selfcompress.training.sandbox import CapturedStep, Sandbox
from lightning_selfcompress.training.watched_steps import step_arguments

Found = dict[str, ChannelAxis | str]  # name of a parameter -> its axis, or why it stays in float


def axes_of_step(trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> Found:
    """Returns what the parameters of a module are in a training step that is about to run.

    Args:
        trainer: The Trainer.
        module: A LightningModule, some of whose layers may be converted.
        batch: The batch of the step.
        batch_idx: Its number.

    Returns:
        The axis of each parameter that is a weight, or why it is none. It is empty where the step could not be run on a
        copy, which is told.
    """
    step = CapturedStep.of(module, trainer, "training_step", step_arguments(module, batch, batch_idx), {})
    try:
        copied = copy_module(module)
        with WeightRoles(copied) as roles:
            Sandbox(module, trainer).run(copied, step, None)
    except Exception as error:  # the user's step may raise any exception on a copy
        warn(
            f"SelfCompression: the first training step could not be run on a copy ({type(error).__name__}: {error}), "
            f"so layers of types that are not known stay in float. register_layer tells what they are."
        )
        return {}
    return _with_their_like(module, roles.axes())


def _with_their_like(module: nn.Module, found: Found) -> Found:
    """Adds parameters that the step did not use to those of other layers of the same class, such as a copy's."""
    places = {name_of(path, name): (m, name) for path, m in module.named_modules() for name in m._parameters}
    seen: dict[tuple[type[nn.Module], str], set[ChannelAxis | str]] = {}
    for key, axis in found.items():
        owner, name = places[key]
        if isinstance(axis, ChannelAxis) and not type(owner).__module__.startswith("torch."):
            per_entry = axis.groups > 1 and axis.groups == owner._parameters[name].shape[0]
            seen.setdefault((type(owner), name), set()).add(ChannelAxis(axis.dim, 0) if per_entry else axis)
    added: Found = {}
    for key, axis in found.items():
        owner, name = places[key]
        axes = seen.get((type(owner), name), set())
        if axis == NOT_SEEN and len(axes) == 1:
            (like,) = axes
            shape = owner._parameters[name].shape
            if isinstance(like, ChannelAxis) and like.dim < len(shape):
                added[key] = ChannelAxis(like.dim, like.groups or shape[0])
    return {**found, **added}


def tell_found(plan: ConversionPlan, axes: Mapping[str, ChannelAxis | str]) -> None:
    """Says which layers were found, and the plan with them."""
    lines = [
        f"  {layer.name or 'the module itself'!r} ({layer.kind}: "
        + ", ".join(f"channels of {name} along dimension {axis.dim}{_groups(axis)}" for name, axis in new)
        + ")"
        for layer in plan.compressed
        if (new := [(n, axis) for n, axis in layer.weights if axes.get(name_of(layer.name, n)) == axis])
    ]
    lines = [*lines[:8], f"  and {len(lines) - 8} more"] if len(lines) > 9 else lines
    tell("\n".join(["SelfCompression found by what they do in the first training step:", *lines, str(plan)]))


def _groups(axis: ChannelAxis) -> str:
    return f", in {axis.groups} groups along dimension 0" if axis.groups > 1 else ""


@dataclass(frozen=True)
class _ConvertAsLoaded:
    """A ``load_state_dict`` pre-hook, of a class so that the module that has it can be pickled and copied.

    Args:
        initial_bits: Bit depth of all channels that the state dict says nothing of.
        skip: What stays in float, as in :func:`convert`.
    """

    initial_bits: float
    skip: tuple[str | type[nn.Module], ...]

    def __call__(self, module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        axes, was_float = axes_in(module, state_dict, prefix), not isinstance(module, Quantized)
        if not axes:
            return
        absent = unmatched(module, self.skip)
        skip = [entry for entry in self.skip if entry not in absent]
        convert(module, initial_bits=self.initial_bits, skip=skip, axes=axes)
        if was_float and isinstance(module, Quantized):  # it loads its own tensors as the float class did
            module.depths_loaded, module.pristine = True, False
            for spec in module._quantized.values():
                state_dict.pop(prefix + spec.axis_key, None)


def convert_when_loaded(
    module: nn.Module, initial_bits: float, skip: Sequence[str | type[nn.Module]]
) -> RemovableHandle:
    """Has a module convert layers of unknown types when it loads a state dict in which they are quantized.

    Args:
        module: The module.
        initial_bits: As in :func:`convert`.
        skip: What stays in float in any case, as in :func:`convert`.

    Returns:
        What takes this back.
    """
    handle = module.register_load_state_dict_pre_hook(_ConvertAsLoaded(initial_bits, tuple(skip)))
    hooks = cast("OrderedDict[int, Any]", module._load_state_dict_pre_hooks)
    hooks.move_to_end(handle.id, last=False)  # before the hook that gives converted layers their shapes
    return cast(RemovableHandle, handle)
