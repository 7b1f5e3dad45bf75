"""Removal of dead channels: plan (pure, printable), then apply.

A channel is dead when the depths of all its producers are zero. Its constants (biases, scales and shifts) have to be
zero as well before it goes, so that its removal changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.graph import NORMS, Channels, Slot, size_attribute, stored_tensors
from lightning_selfcompress.layers import Quantized
from lightning_selfcompress.quantizer import bit_depth

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A parameter that was replaced by a smaller one.

    Args:
        old: The parameter as it was.
        new: The parameter that took its place.
        kept: Dimension -> indices along it that were kept, ascending, int64. Dimensions not named are as before.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]


def shrink(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The entries of a tensor that are kept, as a new tensor.

    Args:
        tensor: Any tensor.
        kept: Dimension -> indices to keep along it.

    Returns:
        A contiguous tensor of the smaller shape.
    """
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


@dataclass(frozen=True)
class Edit:
    """What is taken out of one dimension of one tensor.

    Args:
        name: Path of the parameter or buffer.
        dim: The dimension.
        size: Its size before.
        removed: Indices that go, ascending.
        attribute: Whether ``name`` is a number that a module keeps, not a tensor.
    """

    name: str
    dim: int
    size: int
    removed: tuple[int, ...]
    attribute: bool = False

    @property
    def kept(self) -> Tensor:
        """Indices that stay, int64."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[list(self.removed)] = False
        return mask.nonzero().flatten()


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

    def __str__(self) -> str:
        lines = [f"Removed: {len(self.channels):,} channels, {self.weights:,} weights" if self else "Nothing to remove"]
        if self.widths:
            lines[0] += " (" + ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.widths.items()) + ")"
        lines += [f"  {n} dead in {name} stay: {reason}" for (name, reason), n in self.refused.items()]
        return "\n".join(lines)


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
        The plan: channels that are dead and without constants, less those that are pinned and those that keep a
        layer from losing its last channel.

    Raises:
        ValueError: If ``round_to`` is below 1.
    """
    if round_to < 1:
        raise ValueError(f"Expected round_to >= 1 (channels), got {round_to!r}.")
    dead = dead_channels(model, channels)
    reasons: dict[int, str] = {}
    for number in np.flatnonzero(dead).tolist():
        if number in channels.pinned:
            reasons[number] = channels.pinned[number]
        elif channels.unseen:
            reasons[number] = f"{channels.unseen[0]!r} took no part in the steps watched"
    going = dead & channels.removable()
    constant = going & constant_channels(model, channels)
    reasons |= dict.fromkeys(np.flatnonzero(constant).tolist(), "a bias or shift is fading")
    going &= ~constant
    _keep_widths(channels, going, reasons, round_to)
    return _plan(model, channels, going, reasons)


def narrow(model: nn.Module, channels: Channels, plan: RemovalPlan, wanted: Sequence[int], reason: str) -> RemovalPlan:
    """A smaller plan.

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
                widths[_weight_of(slot)] = slot.size, slot.size - count
            for number in dict.fromkeys(group.tolist()):
                if number in reasons:
                    key = _weight_of(slot), reasons[number]
                    refused[key] = refused.get(key, 0) + 1
    numbers = tuple(np.flatnonzero(going).tolist())
    return RemovalPlan(tuple(edits), numbers, _weights_removed(model, edits), widths, refused)


def _weight_of(slot: Slot) -> str:
    """Path of the layer whose depths a slot holds."""
    return slot.name.removesuffix("bit_depth").removesuffix("_").removesuffix(".")


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


def remove(model: nn.Module, edits: Sequence[Edit]) -> list[Shrunk]:
    """Takes out what a plan says: of parameters, their gradients, buffers and the attributes of modules.

    Args:
        model: The module, or a copy of it.
        edits: Of a :class:`RemovalPlan`.

    Returns:
        The parameters that were replaced, for :func:`shrink_optimizer`.

    Raises:
        ValueError: If the model's tensors are not of the sizes that were planned for. It is unchanged then.
    """
    tensors = stored_tensors(model)
    kept: dict[str, dict[int, Tensor]] = {}
    for edit in (e for e in edits if not e.attribute):
        tensor = tensors.get(edit.name)
        if tensor is None or tensor.dim() <= edit.dim or tensor.shape[edit.dim] != edit.size:
            found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"Expected {edit.name!r} with {edit.size} entries along dimension {edit.dim}, found {found}. Plan the "
                f"removal for the model as it is now."
            )
        kept.setdefault(edit.name, {})[edit.dim] = edit.kept
    smaller = {id(tensors[name]): (tensors[name], _smaller(tensors[name], along)) for name, along in kept.items()}
    replace_tensors(model, {key: new for key, (_, new) in smaller.items()})
    for edit in (e for e in edits if e.attribute):
        path, _, name = edit.name.rpartition(".")
        _resize(model.get_submodule(path), {name: edit.size - len(edit.removed)})
    along_of = {id(tensors[name]): along for name, along in kept.items()}
    return [
        Shrunk(old, cast(nn.Parameter, new), along_of[id(old)])
        for old, new in smaller.values()
        if isinstance(old, nn.Parameter)
    ]


def replace_tensors(model: nn.Module, replacements: Mapping[int, Tensor]) -> None:
    """Puts tensors of other shapes in the place of a model's own, wherever they are used.

    Args:
        model: The module; its attributes that repeat sizes are brought in line.
        replacements: Id of a parameter or buffer -> what takes its place.
    """
    for module in model.modules():
        _replace(module, replacements)


@torch.no_grad()
def _smaller(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    data = shrink(tensor.detach(), kept)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    if tensor.grad is not None:
        new.grad = shrink(tensor.grad, kept)
    return new


def _replace(module: nn.Module, smaller: Mapping[int, Tensor]) -> None:
    """Puts smaller tensors in the place of a module's own, and brings its attributes in line with them."""
    before = _sizes(module)
    gone = 0
    learned = _learned_names(module)
    touched = False
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and id(tensor) in smaller:
                new = table[name] = smaller[id(tensor)]  # type: ignore[assignment]
                gone += 0 if name in learned else (tensor.numel() - new.numel()) * tensor.element_size()
                touched = True
    if not touched:
        return
    module.__dict__["_removed_nbytes"] = module.__dict__.get("_removed_nbytes", 0) + gone
    if isinstance(module, Quantized):
        module.forget_quantized()
    elif isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    _resize(module, _sizes(module, before))


def _learned_names(module: nn.Module) -> set[str]:
    """Names of a layer's own quantized weights, depths and exponents; whose sizes before compression it knows."""
    specs = module._quantized if isinstance(module, Quantized) else {}
    return {key for name, spec in specs.items() for key in (name, spec.bit_depth, spec.exponent)}


def _resize(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Sets what a module knows of its own sizes."""
    if isinstance(module, nn.GroupNorm):  # groups go as a whole
        module.num_groups = sizes["num_channels"] * module.num_groups // module.num_channels
    for name, value in sizes.items():
        setattr(module, name, value)
    if isinstance(module, Quantized) and "groups" in sizes:
        for name, spec in module._quantized.items():
            if spec.axis.groups > 1:
                module._quantized[name] = replace(spec, axis=replace(spec.axis, groups=sizes["groups"]))


def _sizes(module: nn.Module, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """The attributes of a module that repeat the sizes of its tensors, as these say they should be.

    Args:
        module: A module.
        before: The same as it was before its tensors shrank.
    """
    table = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    shape = {name: tuple(t.shape) for name, t in table.items()}
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" in shape:
        return _convolution_sizes(module, shape["weight"], before)
    if isinstance(module, nn.Linear) and "weight" in shape:
        return {"out_features": shape["weight"][0], "in_features": shape["weight"][1]}
    if isinstance(module, nn.Bilinear) and "weight" in shape:
        return dict(zip(("out_features", "in1_features", "in2_features"), shape["weight"], strict=True))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and "weight" in shape:
        return {"embedding_dim": shape["weight"][1]}
    if isinstance(module, NORMS) and ("weight" in shape or "running_mean" in shape):
        return {size_attribute(module): shape["weight" if "weight" in shape else "running_mean"][0]}
    if isinstance(module, nn.PReLU) and "weight" in shape:
        return {"num_parameters": shape["weight"][0]}
    if isinstance(module, nn.RNNBase) and "weight_ih_l0" in shape:
        return {"input_size": shape["weight_ih_l0"][1]}
    if isinstance(module, nn.RNNCellBase) and "weight_ih" in shape:
        return {"input_size": shape["weight_ih"][1]}
    return {}


def _convolution_sizes(
    module: nn.modules.conv._ConvNd, shape: tuple[int, ...], before: Mapping[str, int] | None
) -> dict[str, int]:
    groups, first, second = module.groups, shape[0], shape[1]
    was_depthwise = before is not None and before["groups"] == before["in_channels"] > 1
    if module.transposed and isinstance(module, Quantized):
        groups = cast(Tensor, module._parameters[module._quantized["weight"].bit_depth]).numel() // second
    elif before is not None and was_depthwise and (module.transposed or second == 1):  # groups go with channels
        groups = first if module.transposed else first // (before["out_channels"] // before["groups"])
    if module.transposed:
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}
