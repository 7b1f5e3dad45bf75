"""The plan of a removal, pure and printable, which :func:`~lightning_selfcompress.removal.surgery.remove` applies.

A channel is dead when the depths of all its producers are zero. Its constants (biases, scales and shifts) have to be
zero as well before it goes, so that its removal changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import weight_name_of
from lightning_selfcompress.removal.surgery import Edit
from lightning_selfcompress.tensors import stored_tensors

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class RemovalPlan:
    """What :func:`remove` does. Prints what goes, and why dead channels stay.

    Args:
        edits: For each tensor and dimension what is taken out.
        channels: Numbers of the channels that go.
        weights: Weights of the quantized layers that go, in all.
        widths: Path of each quantized weight that loses output channels -> how many it has before and after.
        refused: Dead channels that stay, counted by the path of their first producer and the reason.
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
        """What goes, in one line."""
        if not self:
            return "Nothing to remove"
        widths = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.widths.items())
        text = f"Removed: {len(self.channels):,} channels, {self.weights:,} weights"
        return f"{text} ({widths})" if widths else text

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why dead channels stay, a line for each layer and reason."""
        return tuple(f"{n} dead in {name} stay: {reason}" for (name, reason), n in self.refused.items())

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {line}" for line in self.refusals)])


def dead_channels(model: nn.Module, channels: Channels) -> Flags:
    """Whether all producers of a channel have come to depth zero.

    Args:
        model: The module.
        channels: Its channels.

    Returns:
        ``(channels.count,)``; False for channels without producers.
    """
    tensors = stored_tensors(model)
    alive = np.zeros(channels.count, bool)
    for slot in channels.slots:
        if slot.produces:
            alive[channels.group[slot.atoms][(bit_depth(tensors[slot.name].detach()) > 0).cpu().numpy()]] = True
    return channels.produced() & ~alive


def constant_channels(model: nn.Module, channels: Channels) -> Flags:
    """Whether a channel has a constant that is not zero: a bias, a scale or a shift.

    Args:
        model: The module.
        channels: Its channels.

    Returns:
        ``(channels.count,)``.
    """
    tensors = stored_tensors(model)
    flags = np.zeros(channels.count, bool)
    for slot in channels.slots:
        if slot.fades:
            flags[channels.group[slot.atoms][(tensors[slot.name].detach().flatten() != 0).cpu().numpy()]] = True
    return flags


def plan_removal(model: nn.Module, channels: Channels, *, round_to: int = 1) -> RemovalPlan:
    """Decides which channels go. Changes nothing.

    Args:
        model: A converted module.
        channels: Its channels, as :class:`Watcher` finds them.
        round_to: Widths are kept at multiples of this.

    Returns:
        The plan: channels that are dead and without constants, except pinned channels and the last channel of a layer.

    Raises:
        ValueError: If ``round_to`` is below 1.
    """
    if round_to < 1:
        raise ValueError(f"Expected round_to >= 1 (channels), got {round_to!r}.")
    dead = dead_channels(model, channels)
    reasons: dict[int, str] = {}
    untouched = channels.of_untouched()
    for number in np.flatnonzero(dead).tolist():
        if number in channels.pinned:
            reasons[number] = channels.pinned[number]
        elif untouched[number]:
            reasons[number] = "no step that was watched runs it"
        elif channels.unseen:
            reasons[number] = f"{channels.unseen[0]!r} took no part in the steps watched"
    going = dead & channels.removable()
    constant = going & constant_channels(model, channels)
    reasons |= dict.fromkeys(np.flatnonzero(constant).tolist(), "a bias or shift is fading")
    going &= ~constant
    _keep_widths(channels, going, reasons, round_to)
    return _plan(model, channels, going, reasons)


def narrow(model: nn.Module, channels: Channels, plan: RemovalPlan, wanted: Sequence[int], reason: str) -> RemovalPlan:
    """The plan for some of a plan's channels.

    Args:
        model: The module.
        channels: Its channels.
        plan: A plan for it.
        wanted: Those channels of the plan that may still go.
        reason: Why the others stay.

    Returns:
        The plan for them.
    """
    going = np.zeros(channels.count, bool)
    going[list(wanted)] = True
    reasons = {number: reason for number in plan.channels if not going[number]}
    smaller = _plan(model, channels, going, reasons)
    return RemovalPlan(
        smaller.edits, smaller.channels, smaller.weights, smaller.widths, {**plan.refused, **smaller.refused}
    )


def _keep_widths(channels: Channels, going: Flags, reasons: dict[int, str], round_to: int) -> None:
    """Takes channels out of ``going`` until every width is a multiple of ``round_to`` and at least one."""
    slots = [(s, channels.group[s.atoms]) for s in channels.slots]
    changed = True
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
    """What plans call the weight whose depths a slot holds: the path of its layer, unless the layer has several."""
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
