"""Surgery: entries taken out of a model's parameters, buffers and sizes, in place, and the tensors that result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.tensors import NORMS, size_attribute, stored_tensors


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


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def zeros_in_place_of(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros of another shape for a tensor: a parameter if it is one, of its type and device, and laid out alike."""
    data = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).contiguous(memory_format=_memory_format(tensor))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


@torch.no_grad()
def _smaller(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    data = shrink(tensor.detach(), kept).contiguous(memory_format=_memory_format(tensor))
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
