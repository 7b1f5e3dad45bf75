"""The plan of a removal, which :func:`~lightning_selfcompress.removal.surgery.remove` carries out.

A channel is dead when the bit depths of all its producers are zero. Its constants (biases, scales and shifts) have to
be zero as well before it is removed, so that the removal does not change the outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import weight_name_of
from lightning_selfcompress.removal.heads import keep_whole
from lightning_selfcompress.removal.surgery import Edit
from lightning_selfcompress.tensors import stored_tensors

Flags = NDArray[np.bool_]


TOGETHER = "they leave together with"  # what else needs them: layers of one sum, or heads of one layer


FADING = "a bias or shift is fading"  # why a dead channel waits for a later removal


@dataclass(frozen=True)
class RemovalPlan:
    """The plan that :func:`remove` carries out. ``print`` shows the removed channels, and why dead channels are kept.

    Args:
        edits: The entries to remove, one edit for each dimension of a tensor.
        channels: Numbers of the channels to remove.
        weights: Total number of the quantized weights to remove.
        widths: Path of each quantized weight that loses output channels -> their numbers before and after the removal.
        refused: Path of a quantized weight and reason -> number of its dead channels that are kept for this reason.
    """

    edits: tuple[Edit, ...] = ()
    channels: tuple[int, ...] = ()
    weights: int = 0
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    refused: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.edits)

    @property
    def summary(self) -> str:
        """The removed channels and weights, in one line."""
        if not self:
            return "Nothing to remove"
        widths = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.widths.items())
        text = f"Removed: {len(self.channels):,} channels, {self.weights:,} weights"
        return f"{text} ({widths})" if widths else text

    @property
    def refusals(self) -> tuple[str, ...]:
        """The reasons for which dead channels are kept, one line for each weight and reason."""
        return tuple(f"{n} dead in {name} stay: {reason}" for (name, reason), n in self.refused.items())

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {line}" for line in self.refusals)])


def dead_channels(model: nn.Module, channels: Channels) -> Flags:
    """Returns whether the bit depths of all producers of each channel are zero.

    Args:
        model: A converted module.
        channels: The channels of the module.

    Returns:
        The flags, ``(channels.count,)``; False for channels without producers.
    """
    tensors = stored_tensors(model)
    alive = np.zeros(channels.count, bool)
    for slot in channels.slots:
        if slot.produces:
            alive[channels.group[slot.atoms][(bit_depth(tensors[slot.name].detach()) > 0).cpu().numpy()]] = True
    return channels.produced() & ~alive


def constant_channels(model: nn.Module, channels: Channels) -> Flags:
    """Returns whether each channel has a constant (a bias, a scale or a shift) that is not zero.

    Args:
        model: A converted module.
        channels: The channels of the module.

    Returns:
        The flags, ``(channels.count,)``.
    """
    tensors = stored_tensors(model)
    flags = np.zeros(channels.count, bool)
    for slot in channels.slots:
        if slot.fades:
            flags[channels.group[slot.atoms][(tensors[slot.name].detach().flatten() != 0).cpu().numpy()]] = True
    return flags


def plan_removal(
    model: nn.Module, channels: Channels, *, round_to: int = 1, waiting: Mapping[int, str] | None = None
) -> RemovalPlan:
    """Decides which channels to remove, without changing the model.

    Args:
        model: A converted module.
        channels: The channels of the module, as :class:`Watcher` finds them.
        round_to: Numbers of output channels are kept at multiples of this number.
        waiting: Channels that have to wait, each with the reason.

    Returns:
        The plan for the dead channels without constants, except pinned channels and the last channel of a layer.

    Raises:
        ValueError: If ``round_to`` is below 1.
    """
    if round_to < 1:
        raise ValueError(f"Expected round_to >= 1 (channels), got {round_to!r}.")
    dead = dead_channels(model, channels)
    reasons: dict[int, str] = {}
    waiting = waiting or {}
    not_run = channels.not_run()
    kept = channels.kept()
    for number in np.flatnonzero(dead).tolist():
        if number in kept:
            reasons[number] = kept[number]
        elif not_run[number]:
            reasons[number] = "no step that was watched runs it"
        elif number in waiting:
            reasons[number] = waiting[number]
    going = dead & channels.removable()
    going[[number for number in waiting if number < channels.count]] = False
    constant = going & constant_channels(model, channels)
    reasons |= dict.fromkeys(np.flatnonzero(constant).tolist(), FADING)
    going &= ~constant
    while keep_whole(channels, going, reasons) | _keep_widths(channels, going, reasons, round_to):
        continue
    plan = _plan(model, channels, going, reasons)
    return replace(plan, refused={**plan.refused, **_living_on(model, channels, dead)})


def narrow(
    model: nn.Module, channels: Channels, plan: RemovalPlan, wanted: Sequence[int], reason: str | Mapping[int, str]
) -> RemovalPlan:
    """Returns the plan for some channels of a plan.

    Args:
        model: A converted module.
        channels: The channels of the module.
        plan: A plan for the module.
        wanted: The channels of the plan that are still to be removed.
        reason: The reason for which the other channels of the plan are kept, or the reason for each of them.
    """
    going = np.zeros(channels.count, bool)
    going[list(wanted)] = True
    others = [number for number in plan.channels if not going[number]]
    reasons = {number: reason if isinstance(reason, str) else reason[number] for number in others}
    smaller = _plan(model, channels, going, reasons)
    return RemovalPlan(
        smaller.edits, smaller.channels, smaller.weights, smaller.widths, {**plan.refused, **smaller.refused}
    )


def _living_on(model: nn.Module, channels: Channels, dead: Flags) -> dict[tuple[str, str], int]:
    """Returns how many dead channels of each layer stay because another layer, or another place, keeps them alive."""
    tensors = stored_tensors(model)
    alive_in: dict[int, str] = {}
    dying: list[tuple[Slot, list[int]]] = []
    for slot in channels.slots:
        if slot.produces:
            group, alive = channels.group[slot.atoms], (bit_depth(tensors[slot.name].detach()) > 0).cpu().numpy()
            for number in np.unique(group[alive]).tolist():
                alive_in.setdefault(number, _layer_of(slot))
            dying.append((slot, group[~alive & ~dead[group]].tolist()))
    found: dict[tuple[str, str], int] = {}
    for slot, numbers in dying:
        for number in numbers:
            if number in alive_in:
                layer, other = _layer_of(slot), alive_in[number]
                of = "other channels of this layer" if other == layer else f"channels of {other!r}"
                key = layer, f"{TOGETHER} {of} that are alive"
                found[key] = found.get(key, 0) + 1
    return found


def _keep_widths(channels: Channels, going: Flags, reasons: dict[int, str], round_to: int) -> bool:
    """Takes channels out of ``going`` until every dimension keeps a channel and a width that is allowed.

    The number of output channels of a quantized weight may be a multiple of ``round_to``, or stay unchanged.

    Returns:
        Whether anything was changed.
    """
    slots = [(s, channels.group[s.atoms]) for s in channels.slots]
    before, changed = int(going.sum()), True
    while changed:
        changed = False
        for slot, group in slots:
            count = int(going[group].sum())
            left = slot.size - count
            multiple = round_to if slot.produces else 1
            wanted = max(-(-left // multiple) * multiple, multiple)
            excess = min(wanted, slot.size) - left
            if count and excess > 0:
                reason = "it is the last of its layer" if left == 0 else f"widths are multiples of {round_to}"
                for number in dict.fromkeys(group[going[group]].tolist()):
                    if slot.size - int(going[group].sum()) >= min(wanted, slot.size):
                        break
                    going[number] = False
                    reasons[number] = reason
                    changed = True
    return int(going.sum()) < before


def _plan(model: nn.Module, channels: Channels, going: Flags, reasons: Mapping[int, str]) -> RemovalPlan:
    edits = []
    for slot in channels.slots:
        removed = np.flatnonzero(going[channels.group[slot.atoms]])
        if len(removed):
            edits.append(Edit(slot.name, slot.dim, slot.size, tuple(removed.tolist()), slot.attribute))
    refused: dict[tuple[str, str], int] = {}
    widths: dict[str, tuple[int, int]] = {}
    for slot in channels.slots:
        if slot.produces:
            group = channels.group[slot.atoms]
            count = int(going[group].sum())
            if count:
                widths[_layer_of(slot)] = slot.size, slot.size - count
            for number in dict.fromkeys(group.tolist()):
                if number in reasons:
                    key = _layer_of(slot), reasons[number]
                    refused[key] = refused.get(key, 0) + 1
    numbers = tuple(np.flatnonzero(going).tolist())
    return RemovalPlan(tuple(edits), numbers, _weights_removed(model, edits), widths, refused)


def _layer_of(slot: Slot) -> str:
    """Returns the name in plans of the weight whose bit depths a slot holds, without the suffix ``weight``."""
    return (weight_name_of(slot.name) or slot.name).removesuffix("weight").removesuffix(".")


def _weights_removed(model: nn.Module, edits: Sequence[Edit]) -> int:
    tensors = stored_tensors(model)
    quantized = {
        id(layer.latent(name)) for layer in model.modules() if isinstance(layer, Quantized) for name in layer._quantized
    }
    by_name: dict[str, dict[int, int]] = {}
    for edit in edits:
        if not edit.attribute and id(tensors[edit.name]) in quantized:
            by_name.setdefault(edit.name, {})[edit.dim] = len(edit.removed)
    total = 0
    for name, removed in by_name.items():
        shape = tensors[name].shape
        left = int(np.prod([n - removed.get(d, 0) for d, n in enumerate(shape)]))
        total += tensors[name].numel() - left
    return total
