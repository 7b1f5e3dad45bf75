"""Loading of packed files into a network, which takes the shapes of the file; an error leaves it unchanged."""

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_selfcompress.activations.formula import LEAST_BITS, MOST_BITS
from lightning_selfcompress.activations.layers import SHORT_KEYS, remove_activations, saved_points, take_points
from lightning_selfcompress.activations.places import can_be_activated
from lightning_selfcompress.errors import CheckpointError, PackedFileError
from lightning_selfcompress.files.export import check_there
from lightning_selfcompress.files.finalize import make_plain
from lightning_selfcompress.files.shapes import Shape, check_sizes
from lightning_selfcompress.packing import Packed, from_file, kept_number
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.removal.surgery import (
    Replacement,
    replace_tensors,
    take_sizes,
    whole_number,
    zeros_in_place_of,
)
from lightning_selfcompress.tensors import name_of, stored_tensors

Module = TypeVar("Module", bound=nn.Module)


def load(path: str | os.PathLike[str], into: Module, *, strict: bool = True) -> Module:
    """Loads a packed file into a network, which becomes plain and then computes the exported outputs to the bit.

    >>> from tempfile import TemporaryDirectory
    >>> from torch import nn
    >>> from lightning_selfcompress import convert, export, load
    >>> net = convert(nn.Linear(6, 4)).model
    >>> with TemporaryDirectory() as folder:
    ...     report = export(net, f"{folder}/net.scnn")
    ...     plain = load(f"{folder}/net.scnn", into=nn.Linear(6, 4))
    >>> plain, plain.weight.equal(net.weight)
    (Linear(in_features=6, out_features=4, bias=True), True)

    Args:
        path: A packed file.
        into: A network of the exported class, of the full size or of the stored size, float or converted. It
            takes the stored shapes, and its tensors keep their dtypes. A warning names the tensors whose narrower dtype
            rounds the stored values.
        strict: Whether the file must hold all parameters and persistent buffers of the network, and nothing else.

    Returns:
        ``into``.

    Raises:
        TypeError: If ``into`` is not a module.
        PackedFileError: If the file is damaged, or does not fit the network, which is unchanged then.
        ValueError: If the network's tensors have no values yet (lazy layers, the meta device).
        OSError: If the file cannot be read.
    """
    if not isinstance(into, nn.Module):
        raise TypeError(f"Expected a network to load into, such as MyNet(), got {into!r:.80}.")
    packed = from_file(path)
    check_there(into)
    learned = learned_tensors(into)
    own = {n: t for n, t in stored_tensors(into, transient=False).items() if id(t) not in learned}
    try:
        _check_names(packed, into, own, strict=strict)
        check_sizes(into, {t.name: t.shape for t in packed.tensors})
        _check_attributes(packed, into, own, strict=strict)
        sizes = _of_heads(packed, into)
        rounded = _check_dtypes(packed, own)
    except CheckpointError as error:
        raise PackedFileError(f"{os.fspath(path)}: {error}") from error
    make_plain(remove_activations(into))
    take_points(into, packed.attributes)
    saved = {t.name: t.tensor() for t in packed.tensors if t.name in own}
    axes = {id(own[t.name]): t.codes.axis for t in packed.coded if t.name in own and t.codes is not None}
    take_sizes(into, sizes)  # before the sizes of normalization layers without tensors, which it gives back
    _fill(into, own, saved, packed.attributes, axes)
    if rounded:
        warnings.warn(f"{_some(rounded)}: rounded to the types of the network.", stacklevel=2)
    return into


def _check_names(packed: Packed, into: nn.Module, own: Mapping[str, Tensor], *, strict: bool) -> None:
    shapes = {t.name for t in packed.tensors}
    missing, unknown = [n for n in own if n not in shapes], [t.name for t in packed.tensors if t.name not in own]
    if strict and (missing or unknown):
        parts = [f"nothing for {_some(missing)}"] * bool(missing) + [f"{_some(unknown)} too"] * bool(unknown)
        raise CheckpointError(
            f"expected the parameters and buffers of a {type(into).__name__}, found {' and '.join(parts)}. "
            f"Build the network as it was when it was exported; strict=False takes what fits."
        )
    if own and len(missing) == len(own):
        raise CheckpointError(f"expected tensors of a {type(into).__name__}, found none. It is of another network.")


def _check_attributes(packed: Packed, into: nn.Module, own: Mapping[str, Tensor], *, strict: bool) -> None:
    """Checks that the integer attributes in a file fit the network's modules and the shapes in the file."""
    shapes = {id(own[t.name]): t.shape for t in packed.tensors if t.name in own}  # tied tensors have one name
    known = set()
    for path, module in into.named_modules():
        kind = kept_number(module)
        if not kind:
            continue
        name = name_of(path, kind)
        known.add(name)
        weight, bias = (shapes.get(id(module._parameters.get(n))) for n in ("weight", "bias"))
        if not _fits(packed.attributes.get(name), module, weight, bias):
            raise CheckpointError(
                f"expected {name!r} to fit this {type(into).__name__} and its shapes, got "
                f"{packed.attributes.get(name)}. Build the network as it was when it was exported."
            )
    heads = _of_heads(packed, into)
    for name, number in heads.items():
        if not 1 <= number <= (whole_number(into, name) or 0):
            raise CheckpointError(
                f"expected {name!r} from 1 to {whole_number(into, name)}, got {number}. Build the network as it was "
                f"when it was exported."
            )
    known |= _points_in(packed, into)
    unknown = [name for name in packed.attributes if name not in known and name not in heads]
    if strict and unknown:
        raise CheckpointError(
            f"expected numbers of the modules of a {type(into).__name__}, found {_some(unknown)} too. Build the "
            f"network as it was when it was exported; strict=False takes what fits."
        )


def _points_in(packed: Packed, into: nn.Module) -> set[str]:
    """Returns the names of the points in a file at which modules of the network quantize activations."""
    modules = dict(into.named_modules())
    found = set()
    for path, places in saved_points(packed.attributes).items():
        for where, (point, _) in places.items():
            name = name_of(path, SHORT_KEYS[where])
            if path not in modules or not LEAST_BITS <= point.bits <= MOST_BITS or not can_be_activated(modules[path]):
                raise CheckpointError(
                    f"expected {name!r} to be how a module of this {type(into).__name__} quantizes activations, got "
                    f"{packed.attributes[name]}. Build the network as it was when it was exported."
                )
            found.add(name)
    return found


def _of_heads(packed: Packed, into: nn.Module) -> dict[str, int]:
    """Returns the attributes in a file that removals of heads changed."""
    kept = {name_of(path, kept_number(module)) for path, module in into.named_modules() if kept_number(module)}
    return {n: v for n, v in packed.attributes.items() if n not in kept and whole_number(into, n) is not None}


def _fits(number: int | None, module: nn.Module, weight: Shape | None, bias: Shape | None) -> bool:
    """Returns whether a module of these shapes can have the number in the file, which is None if the file has none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return weight is None or _are_groups(1 if number is None else number, module, weight, bias)
    if number is None:
        return True
    if isinstance(module, nn.GroupNorm):
        channels = module.num_channels if weight is None else weight[0]
        return number * (module.num_channels // module.num_groups) == channels
    return 1 <= number <= int(getattr(module, kept_number(module)))


def _are_groups(groups: int, module: nn.modules.conv._ConvNd, weight: Shape, bias: Shape | None) -> bool:
    """Returns whether a convolution whose weight has this shape can have so many groups, perhaps after removals."""
    if not 1 <= groups <= module.groups or weight[0] % groups:
        return False
    along, most = weight[1] * groups, module.out_channels if module.transposed else module.in_channels
    return along <= most and not (module.transposed and bias and bias[0] != along)


def _check_dtypes(packed: Packed, own: Mapping[str, Tensor]) -> list[str]:
    """Checks that the network's dtypes can hold the stored values; returns the names of tensors that round them."""
    rounded = []
    for tensor in (t for t in packed.tensors if t.name in own):
        dtype = own[tensor.name].dtype
        if not torch.can_cast(tensor.dtype, dtype):
            raise CheckpointError(
                f"expected {tensor.name!r} of a type that {dtype} can hold, got {tensor.dtype}. Build the network as "
                f"it was when it was exported."
            )
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            rounded.append(tensor.name)
    return rounded


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def _fill(
    into: nn.Module,
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    axes: Mapping[int, ChannelAxis],
) -> None:
    fresh: dict[int, Replacement] = {}
    for name, values in saved.items():
        old = own[name]
        expanded = any(n > 1 and stride == 0 for n, stride in zip(old.shape, old.stride(), strict=True))
        if values.shape != old.shape or expanded:  # the entries of an expanded tensor share memory
            fresh[id(old)] = zeros_in_place_of(old, values.shape)
    replace_tensors(into, fresh, axes)
    now = stored_tensors(into, transient=False)
    for name, values in saved.items():
        now[name].copy_(values)
    filled = {id(now[name]) for name in saved}
    for path, module in into.named_modules():
        module.__dict__.pop("_removed_nbytes", None)
        for name, value in _numbers(path, module, filled, numbers):
            setattr(module, name, value)


def _numbers(path: str, module: nn.Module, filled: set[int], numbers: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yields the integer attributes of a module that the file determines; ``filled`` has the ids of filled tensors."""
    if isinstance(module, nn.modules.conv._ConvNd) and id(module._parameters.get("weight")) in filled:
        groups = numbers.get(name_of(path, "groups"), 1)
        yield "groups", groups
        yield "out_channels" if module.transposed else "in_channels", module.weight.shape[1] * groups
    elif kept_number(module) == "num_features" and name_of(path, "num_features") in numbers:
        yield "num_features", numbers[name_of(path, "num_features")]
