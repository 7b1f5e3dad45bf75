"""Surgery, which removes entries from a model's parameters and buffers in place and updates its size attributes."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.layers import COUPLING, Quantized
from lightning_selfcompress.removal.own_widths import bring_widths_along, own_shapes
from lightning_selfcompress.removal.sharding import check_shards, settle_shards, shard_again, shard_like
from lightning_selfcompress.tensors import (
    NORMS,
    SIZES,
    is_bare_norm,
    is_sharded,
    name_of,
    own_tensors,
    size_attribute,
    stored_tensors,
    whole,
)


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A parameter or buffer from which entries were removed.

    Args:
        old: The tensor object that the model had before. It has the smaller data now, unless ``new`` is a new object.
        new: The tensor object that the model has now. It is the same object as ``old``, unless a graph that was
            recorded with the old shape is alive.
        kept: Dimension -> kept indices along it, ascending, int64. All other dimensions are unchanged.
        shape: The shape before the removal.
        name: Path of the tensor in the model.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]
    shape: tuple[int, ...]
    name: str = ""


def shrink(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Returns a tensor of the kept entries of a tensor.

    Args:
        tensor: Any tensor.
        kept: Dimension -> indices to keep along it.

    Returns:
        A new tensor of the smaller shape, or the same object if ``kept`` is empty. A sharded tensor is gathered in all
        processes, and sharded again in the same way.
    """
    if is_sharded(tensor) and kept:
        return shard_like(shrink(whole(tensor), kept), tensor)
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


@dataclass(frozen=True)
class Edit:
    """The entries to remove along one dimension of one tensor.

    Args:
        name: Path of the parameter or buffer.
        dim: The dimension.
        size: The size of the dimension before the removal.
        removed: Indices to remove, ascending.
        attribute: Whether ``name`` is the path of a module's size attribute instead of a tensor.
    """

    name: str
    dim: int
    size: int
    removed: tuple[int, ...]
    attribute: bool = False

    @property
    def kept(self) -> Tensor:
        """The indices to keep, ascending, int64."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[list(self.removed)] = False
        return mask.nonzero().flatten()


def kept_entries(edits: Sequence[Edit]) -> dict[str, dict[int, Tensor]]:
    """Returns, for the name of each tensor that loses entries, the indices to keep along each dimension."""
    kept: dict[str, dict[int, Tensor]] = {}
    for edit in (e for e in edits if not e.attribute):
        kept.setdefault(edit.name, {})[edit.dim] = edit.kept
    return kept


def remove(model: nn.Module, edits: Sequence[Edit]) -> list[Shrunk]:
    """Removes entries from parameters, their gradients and buffers, and updates the size attributes of modules.

    Args:
        model: The module for which the removal was planned, or a copy of it.
        edits: The edits of a :class:`RemovalPlan`.

    Returns:
        The tensors that have become smaller, for :func:`shrink_optimizer`.

    Raises:
        ValueError: If the model's tensors do not have the planned sizes, or a parameter is sharded by something other
            than ``fully_shard``. The model is unchanged then.
        RuntimeError: If FSDP2 holds gradients that it has not reduced. The model is unchanged then.

    Where FSDP2 shards the parameters, all processes call this with the same edits. Each parameter is gathered on its
    own, so that a process never holds more than one whole parameter and its gradient.
    """
    settle_shards(model)
    check_shards(model)
    tensors = stored_tensors(model)
    for edit in (e for e in edits if not e.attribute):
        tensor = tensors.get(edit.name)
        if tensor is None or tensor.dim() <= edit.dim or tensor.shape[edit.dim] != edit.size:
            found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"Expected {edit.name!r} with {edit.size} entries along dimension {edit.dim}, found {found}. Plan the "
                f"removal for the model as it is now."
            )
    kept = kept_entries(edits)
    shapes = {name: tuple(tensors[name].shape) for name in kept}
    now = replace_tensors(model, _Smaller({id(tensors[name]): (tensors[name], along) for name, along in kept.items()}))
    for edit in (e for e in edits if e.attribute):
        path, _, name = edit.name.rpartition(".")
        set_size(model.get_submodule(path), name, edit.size - len(edit.removed))
    return [Shrunk(tensors[name], now[id(tensors[name])], along, shapes[name], name) for name, along in kept.items()]


@dataclass(frozen=True, eq=False)
class Replacement:
    """The new entries of a tensor.

    Args:
        data: The values, of any shape.
        grad: The gradient, of the same shape, or None.
    """

    data: Tensor
    grad: Tensor | None = None


def replace_tensors(
    model: nn.Module, replacements: Mapping[int, Replacement], axes: Mapping[int, ChannelAxis] | None = None
) -> dict[int, Tensor]:
    """Gives tensors of a model new entries in every module that has them; the tensors stay the same objects.

    A list, an optimizer, a hook or a closure that holds a parameter therefore holds the smaller parameter afterwards.
    While a graph that was recorded with the old shape is alive, as for a loss that is kept in a list, autograd refuses
    gradients of the new shape for the same object. In this case a new parameter with the hooks of the old one replaces
    it in the model.

    Args:
        model: The module, whose size attributes are updated.
        replacements: Id of a parameter or buffer -> its new entries.
        axes: Id of a parameter -> the axis of its output channels, for layers that are not quantized.

    Returns:
        Id -> the tensor that the model has now, which is the same object or a new one.
    """
    touched = [m for m in model.modules() if any(id(t) in replacements for _, t in own_tensors(m))]
    before = [(_sizes(m), own_shapes(m), _axes_of(m, axes or {})) for m in touched]
    now: dict[int, Tensor] = {}
    for module in touched:
        learned = _learned_names(module)
        gone = 0
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in replacements:
                    if id(tensor) not in now:  # a tied tensor is given and counted once
                        entries = replacements[id(tensor)]
                        fewer = tensor.numel() - entries.data.numel()
                        gone += 0 if name in learned else fewer * tensor.element_size()
                        now[id(tensor)] = _give(model, tensor, entries)
                    table[name] = now[id(tensor)]  # type: ignore[assignment]
        module.__dict__["_removed_nbytes"] = module.__dict__.get("_removed_nbytes", 0) + gone
    for module, (sizes, shapes, of_weights) in zip(touched, before, strict=True):
        if isinstance(module, Quantized):
            module.forget_quantized()
            module.__dict__.pop(COUPLING, None)
        elif isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        _resize(module, _sizes(module, sizes))
        if not sizes:
            bring_widths_along(module, shapes, of_weights)
    return now


def _axes_of(module: nn.Module, axes: Mapping[int, ChannelAxis]) -> dict[str, ChannelAxis]:
    return {name: axes[id(p)] for name, p in module._parameters.items() if id(p) in axes}


def give(tensor: Tensor, entries: Replacement) -> Tensor:
    """Gives a leaf tensor new entries in place.

    Args:
        tensor: A parameter or buffer.
        entries: The new entries, of the same dtype and on the same device.

    Returns:
        The same object. If a graph that was recorded with the old shape is alive, a new ``nn.Parameter`` or tensor with
        the same attributes and hooks; the old object and the graph are then unchanged.
    """
    data, gradient = tensor.data, tensor.grad
    tensor.grad = None
    tensor.data = entries.data
    if _is_held_by_a_graph(tensor):
        gc.collect()  # frees graphs that only a reference cycle keeps alive
        if _is_held_by_a_graph(tensor):
            tensor.data, tensor.grad = data, gradient
            return _successor(tensor, entries)
    tensor.grad = entries.grad
    return tensor


def _is_held_by_a_graph(tensor: Tensor) -> bool:
    """Returns whether a graph that was recorded before a tensor's data changed shape is alive.

    Autograd has one node that accumulates the gradient of a leaf. The node lives as long as any graph that contains it,
    and stores the shape that the leaf had when the node was made.
    """
    if not tensor.requires_grad:
        return False
    with torch.enable_grad():
        view = tensor.view_as(tensor)
    assert view.grad_fn is not None
    accumulator = view.grad_fn.next_functions[0][0]
    assert accumulator is not None
    return tuple(accumulator._input_metadata[0].shape) != tuple(tensor.shape)


def _successor(tensor: Tensor, entries: Replacement) -> Tensor:
    """Returns a new leaf tensor with the new entries, and with the attributes and hooks of the old tensor."""
    new = entries.data.detach()
    new = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new.requires_grad_()
    new.__dict__.update(tensor.__dict__)
    for hook in list((tensor._backward_hooks or {}).values()):
        new.register_hook(hook)
    for hook in list((getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values()):
        new.register_post_accumulate_grad_hook(hook)
    new.grad = entries.grad
    return new


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def zeros_in_place_of(tensor: Tensor, shape: Sequence[int]) -> Replacement:
    """Returns zeros of a given shape, with the dtype, device and memory format of a tensor."""
    data = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return Replacement(data.contiguous(memory_format=_memory_format(tensor)))


class _Smaller(Mapping[int, Replacement]):
    """The kept entries of tensors, computed when they are asked for, so that memory holds one tensor twice."""

    def __init__(self, edited: Mapping[int, tuple[Tensor, Mapping[int, Tensor]]]) -> None:
        self._edited = edited

    def __contains__(self, key: object) -> bool:
        return key in self._edited

    @torch.no_grad()
    def __getitem__(self, key: int) -> Replacement:
        tensor, kept = self._edited[key]
        data = shrink(whole(tensor.detach()), kept).contiguous(memory_format=_memory_format(tensor))
        return Replacement(data, shrink(whole(tensor.grad), kept) if tensor.grad is not None else None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._edited)

    def __len__(self) -> int:
        return len(self._edited)


def _give(model: nn.Module, tensor: Tensor, entries: Replacement) -> Tensor:
    if is_sharded(tensor):
        return shard_again(model, tensor, entries.data, entries.grad)
    return give(tensor, entries)


def _learned_names(module: nn.Module) -> set[str]:
    """Returns the names of a layer's quantized weights, bit depths and exponents; its specs have the original sizes."""
    return {*module._quantized, *module.learned_names()} if isinstance(module, Quantized) else set()


def _resize(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Sets the size attributes of a module, and the sizes that depend on them."""
    if isinstance(module, nn.GroupNorm):  # groups are removed as a whole
        module.num_groups = sizes["num_channels"] * module.num_groups // module.num_channels
    for name, value in sizes.items():
        setattr(module, name, value)
    if isinstance(module, Quantized) and "groups" in sizes:
        for name, spec in module._quantized.items():
            if spec.axis.groups > 1:
                module._quantized[name] = replace(spec, axis=replace(spec.axis, groups=sizes["groups"]))


def size_names(module: nn.Module) -> set[str]:
    """Returns the names of the attributes of a module that are brought in line with the shapes of its tensors."""
    return {*_sizes(module), size_attribute(module)} if isinstance(module, NORMS) else {*_sizes(module)}


def set_size(module: nn.Module, name: str, value: int) -> None:
    """Sets a size; notes the first value of an attribute that no shape of a tensor of its module tells."""
    if name in size_names(module) and not is_bare_norm(module):
        _resize(module, {name: value})
    else:
        module.__dict__.setdefault(SIZES, {}).setdefault(name, getattr(module, name))
        setattr(module, name, value)


def changed_sizes(model: nn.Module) -> dict[str, int]:
    """Returns the attributes that removals changed and no shape tells, by their paths, with the values of now."""
    noted = ((path, module, name) for path, module in model.named_modules() for name in module.__dict__.get(SIZES, ()))
    return {name_of(path, name): getattr(module, name) for path, module, name in noted}


def whole_number(model: nn.Module, path: str) -> int | None:
    """Returns the value of an attribute of a module by its path, or None if there is no such whole number."""
    owner, _, name = path.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    value = vars(module).get(name) if module is not None else None
    return value if type(value) is int else None


def take_sizes(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Gives a model the attributes that :func:`changed_sizes` returned; all others get their first values again."""
    for path, module in model.named_modules():
        for name, first in module.__dict__.pop(SIZES, {}).items():
            setattr(module, name, sizes.get(name_of(path, name), first))
            if name_of(path, name) in sizes:
                module.__dict__.setdefault(SIZES, {})[name] = first
    for path, value in sizes.items():
        owner, _, name = path.rpartition(".")
        set_size(model.get_submodule(owner), name, value)


def _sizes(module: nn.Module, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns the size attributes of a module, computed from the shapes of its tensors.

    Args:
        module: A module.
        before: The result of the same function before the tensors of the module shrank.
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
        sizes = {"input_size": shape["weight_ih_l0"][1], "hidden_size": shape["weight_hh_l0"][1]}
        projection = shape.get("weight_hr_l0")
        return sizes if projection is None else {**sizes, "hidden_size": projection[1], "proj_size": projection[0]}
    if isinstance(module, nn.RNNCellBase) and "weight_ih" in shape:
        return {"input_size": shape["weight_ih"][1], "hidden_size": shape["weight_hh"][1]}
    return {}


def _convolution_sizes(
    module: nn.modules.conv._ConvNd, shape: tuple[int, ...], before: Mapping[str, int] | None
) -> dict[str, int]:
    groups, first, second = module.groups, shape[0], shape[1]
    was_depthwise = before is not None and before["groups"] == before["in_channels"] > 1
    if module.transposed and isinstance(module, Quantized):
        groups = module.learned("weight")[0].numel() // second
    elif before is not None and was_depthwise and (module.transposed or second == 1):  # one input channel per group
        groups = first if module.transposed else first // (before["out_channels"] // before["groups"])
    if module.transposed:
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}
