"""Surgery: entries taken out of a model's parameters, buffers and sizes, in place, and the tensors that result."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.layers import COUPLING, Quantized
from lightning_selfcompress.tensors import NORMS, own_tensors, size_attribute, stored_tensors


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A parameter, or a learned buffer, from which entries were taken.

    Args:
        old: The tensor object as it was held before. Its data are the smaller ones now, unless ``new`` is another.
        new: The tensor object that the model has now: the same one, but where somebody still holds a graph of the old
            shape.
        kept: Dimension -> indices along it that were kept, ascending, int64. Dimensions not named are as before.
        shape: The shape before.
        name: Path of the tensor in the model.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]
    shape: tuple[int, ...]
    name: str = ""


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


def remove(model: nn.Module, edits: Sequence[Edit]) -> list[Shrunk]:
    """Takes out what a plan says: of parameters, their gradients, buffers and the attributes of modules.

    Args:
        model: The module, or a copy of it.
        edits: Of a :class:`RemovalPlan`.

    Returns:
        What has become smaller, for :func:`shrink_optimizer`.

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
    shapes = {name: tuple(tensors[name].shape) for name in kept}
    now = replace_tensors(model, {id(tensors[name]): _smaller(tensors[name], along) for name, along in kept.items()})
    for edit in (e for e in edits if e.attribute):
        path, _, name = edit.name.rpartition(".")
        _resize(model.get_submodule(path), {name: edit.size - len(edit.removed)})
    return [Shrunk(tensors[name], now[id(tensors[name])], along, shapes[name], name) for name, along in kept.items()]


@dataclass(frozen=True, eq=False)
class Replacement:
    """What takes the place of a tensor's entries.

    Args:
        data: The values, of any shape.
        grad: The gradient, of the same shape; None if there is none.
    """

    data: Tensor
    grad: Tensor | None = None


def replace_tensors(model: nn.Module, replacements: Mapping[int, Replacement]) -> dict[int, Tensor]:
    """Gives tensors of a model other entries, wherever they are used: the same objects, with other data.

    Whoever holds a parameter (a list, an optimizer, a hook, a closure) holds the smaller one afterwards. Where somebody
    still holds a graph that was recorded with the old shape, such as a loss in a list, autograd refuses gradients of
    the new shape for the same object; a new parameter, with the old one's hooks, then takes its place in the model.

    Args:
        model: The module; its attributes that repeat sizes are brought in line.
        replacements: Id of a parameter or buffer -> its new entries.

    Returns:
        For each of the ids the tensor that the model has now: the same object, or a new one.
    """
    touched = [m for m in model.modules() if any(id(t) in replacements for _, t in own_tensors(m))]
    before = [(_sizes(m), _nbytes(m)) for m in touched]
    now: dict[int, Tensor] = {}
    for module in touched:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in replacements:
                    if id(tensor) not in now:
                        now[id(tensor)] = give(tensor, replacements[id(tensor)])
                    table[name] = now[id(tensor)]  # type: ignore[assignment]
    for module, (sizes, nbytes) in zip(touched, before, strict=True):
        gone = nbytes - _nbytes(module)
        module.__dict__["_removed_nbytes"] = module.__dict__.get("_removed_nbytes", 0) + gone
        if isinstance(module, Quantized):
            module.forget_quantized()
            module.__dict__.pop(COUPLING, None)
        elif isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        _resize(module, _sizes(module, sizes))
    return now


def give(tensor: Tensor, entries: Replacement) -> Tensor:
    """Gives a leaf tensor other entries in place.

    Args:
        tensor: A parameter or buffer.
        entries: Of the same type, and on the same device.

    Returns:
        The same object; a new one of the same class, with the same attributes and hooks, where a graph recorded with
        the old shape is alive. The old object is then as it was, and so is that graph.
    """
    data, gradient = tensor.data, tensor.grad
    tensor.grad = None
    tensor.data = entries.data
    if _is_held_by_a_graph(tensor):
        gc.collect()  # a graph in a cycle of objects is held by nobody
        if _is_held_by_a_graph(tensor):
            tensor.data, tensor.grad = data, gradient
            return _successor(tensor, entries)
    tensor.grad = entries.grad
    return tensor


def _is_held_by_a_graph(tensor: Tensor) -> bool:
    """Whether there is a graph that was recorded before a tensor's data changed shape.

    Autograd has one node that accumulates a leaf's gradient, which lives as long as any graph it is part of, and
    remembers the shape that the leaf had when the node was made.
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
    """A tensor that takes the place of another one, with its hooks."""
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
    """Zeros of another shape in the place of a tensor's entries, of its type and device, and laid out alike."""
    data = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return Replacement(data.contiguous(memory_format=_memory_format(tensor)))


@torch.no_grad()
def _smaller(tensor: Tensor, kept: Mapping[int, Tensor]) -> Replacement:
    data = shrink(tensor.detach(), kept).contiguous(memory_format=_memory_format(tensor))
    return Replacement(data, shrink(tensor.grad, kept) if tensor.grad is not None else None)


def _nbytes(module: nn.Module) -> int:
    """Bytes of a module's tensors but for its learned ones, whose sizes before compression it knows."""
    learned = _learned_names(module)
    return sum(t.numel() * t.element_size() for name, t in own_tensors(module) if name not in learned)


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
        groups = module.learned("weight")[0].numel() // second
    elif before is not None and was_depthwise and (module.transposed or second == 1):  # groups go with channels
        groups = first if module.transposed else first // (before["out_channels"] // before["groups"])
    if module.transposed:
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}
