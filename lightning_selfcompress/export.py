"""Packed files of models: written whole or not at all, and loaded into a network of the user's class."""

import os
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_selfcompress.checkpoint import check_sizes
from lightning_selfcompress.files import write_beside
from lightning_selfcompress.finalize import make_plain
from lightning_selfcompress.graph import stored_tensors
from lightning_selfcompress.layers import whole
from lightning_selfcompress.packing import Packed, PackedFileError, from_file, is_half, to_bytes
from lightning_selfcompress.parameters import quantized_parameters
from lightning_selfcompress.surgery import replace_tensors

Module = TypeVar("Module", bound=nn.Module)


def export(model: nn.Module, path: str | os.PathLike[str], *, floats: torch.dtype = torch.float32) -> int:
    """Writes a model into a packed file, of the size that :func:`size_report` says.

    Args:
        model: Any module. What is not quantized is stored as it is.
        path: The file. It is written beside and renamed: no half of it is ever there.
        floats: ``torch.float16`` rounds biases, normalization and other float32 values that are not quantized to
            half precision, except where that would change one by more than a thousandth.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: If weights are not finite, have no values yet (lazy layers, the meta device), or their codes are out
            of all bounds; if ``floats`` is neither ``torch.float32`` nor ``torch.float16``.
        OSError: If the path cannot be written.
    """
    half = is_half(floats)
    _check_values(model)
    packed = Packed.of(model, half=half)
    _check_equal(model, packed)
    if not packed.coded:
        warnings.warn(
            f"Nothing in this {type(model).__name__} is compressed: all its values are stored as they are. Train it "
            f"with SelfCompression first.",
            stacklevel=2,
        )
    data = to_bytes(packed)
    write_beside(path, lambda part: part.write_bytes(data))
    return len(data)


def load(path: str | os.PathLike[str], into: Module, *, strict: bool = True) -> Module:
    """Fills a network from a packed file: plain torch layers of the shapes stored, the same outputs to the bit.

    Args:
        path: A packed file.
        into: A network of the class that was exported, of full size or of the sizes stored, float or converted. It
            becomes plain, takes the shapes, and is filled.
        strict: Whether the file has to hold all of the network's parameters and buffers, and nothing else.

    Returns:
        ``into``.

    Raises:
        PackedFileError: If the file is damaged, or does not fit the network, which is unchanged then.
        OSError: If it cannot be read.
    """
    packed = from_file(path)
    learned = {id(t) for p in quantized_parameters(into) for t in (p.raw_depth, p.exponent)}
    own = {n: t for n, t in stored_tensors(into, transient=False).items() if id(t) not in learned}
    _check(packed, into, own, strict=strict, path=os.fspath(path))
    make_plain(into)
    saved = {t.name: t.tensor() for t in packed.tensors if t.name in own}
    _fill(into, own, saved, packed.attributes)
    return into


def _check_values(model: nn.Module) -> None:
    """Whether all that is to be stored has values, and finite ones; buffers such as masks may hold infinities."""
    for path, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{own}".lstrip(".")
            if tensor is None or own in module._non_persistent_buffers_set:
                continue
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                reason = "on the meta device" if not nn.parameter.is_lazy(tensor) else "of a lazy layer"
                raise ValueError(f"Expected values in {name!r}, which is {reason}. Run or load the network first.")
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                continue
            lost = tensor.isnan() if own in module._buffers else ~tensor.isfinite()
            if bool(lost.any()):
                raise ValueError(
                    f"Expected finite values, got NaN or infinity in {name!r}. Export a checkpoint from before that."
                )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            warnings.warn(
                f"The extra state of {path or 'the network'!r} is not stored: packed files hold tensors alone. "
                f"Keep it in buffers.",
                stacklevel=3,
            )


def _check_equal(model: nn.Module, packed: Packed) -> None:
    """Whether the weights to be written are those that the model computes with."""
    written = {t.name: t for t in packed.coded}
    for p in quantized_parameters(model):
        weight = whole(getattr(p.layer, p.weight_name).detach()).cpu()
        if not torch.equal(written[p.name].tensor(), weight):
            raise ValueError(
                f"Expected codes of {p.name!r} below 2^31 and exponents from -128 to 127, got others. Its steps are "
                f"far too small or too large; export an earlier checkpoint."
            )


def _check(packed: Packed, into: nn.Module, own: Mapping[str, Tensor], *, strict: bool, path: str) -> None:
    shapes = {t.name: t.shape for t in packed.tensors}
    missing, unknown = [n for n in own if n not in shapes], [n for n in shapes if n not in own]
    if strict and (missing or unknown):
        parts = [f"nothing for {_some(missing)}"] * bool(missing) + [f"{_some(unknown)} too"] * bool(unknown)
        raise PackedFileError(
            f"{path}: expected the parameters and buffers of a {type(into).__name__}, found {' and '.join(parts)}. "
            f"Build the network as it was when it was exported; strict=False takes what fits."
        )
    try:
        check_sizes(into, shapes)
    except RuntimeError as error:
        raise PackedFileError(f"{path}: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def _fill(into: nn.Module, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    fresh: dict[int, Tensor] = {}
    for name, values in saved.items():
        if values.shape != own[name].shape:
            data = torch.empty(values.shape, dtype=own[name].dtype, device=own[name].device)
            is_parameter = isinstance(own[name], nn.Parameter)
            fresh[id(own[name])] = nn.Parameter(data, own[name].requires_grad) if is_parameter else data
    replace_tensors(into, fresh)
    now = stored_tensors(into, transient=False)
    for name, values in saved.items():
        now[name].copy_(values)
    modules = dict(into.named_modules())
    for name, groups in numbers.items():
        module = modules.get(name.removesuffix(".groups"))
        if isinstance(module, nn.modules.conv._ConvNd):
            per_group = module.weight.shape[1]
            module.groups = groups
            setattr(module, "out_channels" if module.transposed else "in_channels", per_group * groups)
    for module in modules.values():
        module.__dict__.pop("_removed_nbytes", None)
