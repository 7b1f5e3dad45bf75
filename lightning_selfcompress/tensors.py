"""Helpers for the names, classes and tensors of modules, and for the tensors in nested values."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
SIZES = "_removed_sizes"  # the attribute of a module with the first values of the sizes that removals changed


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and tensor of each parameter and buffer of the module itself; None entries are skipped."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def name_of(path: str, name: str) -> str:
    """Joins the path of a module and the name of one of its tensors or attributes into a name in the network."""
    return f"{path}.{name}".lstrip(".")


def is_a(thing: object, class_name: str) -> bool:
    """Returns whether the class of an object, or one of its bases, has this name, in any package.

    Names are compared because ``lightning`` and ``pytorch_lightning`` define different classes of the same name, and
    because torch has moved some classes from one module to another.
    """
    return base_named(type(thing), class_name) is not None


def base_named(kind: type, class_name: str) -> type | None:
    """Returns the first class with this name among a class and its bases, or None if no class has it."""
    return next((base for base in kind.__mro__ if base.__name__ == class_name), None)


def put_on(thing: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of one object, past its class; returns a function that takes it off again.

    Args:
        thing: Any object with a ``__dict__``.
        name: Name of the attribute, mostly of a method.
        value: Its value until the returned function is called.
    """
    own = vars(thing)
    earlier = {name: own[name]} if name in own else {}
    own[name] = value

    def take_off() -> None:
        own.pop(name, None)
        own.update(earlier)

    return take_off


def is_bare_norm(module: nn.Module) -> bool:
    """Returns whether a module is a normalization layer without tensors, so that only an attribute holds its size."""
    return isinstance(module, NORMS) and not any(True for _ in own_tensors(module))


def size_attribute(module: nn.Module) -> str:
    """Returns the name of the attribute that holds the number of channels of a normalization layer."""
    return "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"


def stored_tensors(model: nn.Module, *, transient: bool = True) -> dict[str, Tensor]:
    """Returns all parameters and buffers by name; a shared tensor appears once, under the first of its names.

    Args:
        model: Any module.
        transient: Whether non-persistent buffers are included.

    Returns:
        The tensors under their names in a state dict, latent weights included and lazy parameters excluded.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        left_out = () if transient else module._non_persistent_buffers_set
        for name, tensor in own_tensors(module):
            if name not in left_out and id(tensor) not in seen and not nn.parameter.is_lazy(tensor):
                seen.add(id(tensor))
                found[name_of(path, name)] = tensor
    return found


def copy_module(model: nn.Module) -> nn.Module:
    """Makes a deep copy of a module, with all its attributes.

    A tensor that is not a leaf of the autograd graph is copied without its graph. An object that cannot be copied (a
    lock, a generator, an open file) is shared with the copy.

    Args:
        model: Any module; it is not changed.

    Returns:
        A module of the same class that shares no parameter or buffer with the original.
    """
    kept = [t for module in model.modules() for t in tensors_in(vars(module)) if not t.is_leaf]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # the copy method of an attribute may raise any exception
        for module in model.modules():
            state = module.__reduce_ex__(4)[2]  # a LightningModule excludes its Trainer from its state
            for name, value in state.items() if isinstance(state, dict) else ():
                if name not in _OF_EVERY_MODULE:
                    _share_what_cannot_be_copied(value, memo, set())
        return copy.deepcopy(model, memo)


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _share_what_cannot_be_copied(value: Any, memo: dict[int, Any], entered: set[int]) -> None:
    """Adds each smallest part of a value that cannot be copied to a ``copy.deepcopy`` memo, as its own copy."""
    if id(value) in memo or id(value) in entered or _can_be_copied(value, memo):
        return
    entered.add(id(value))
    items = _items(value)
    if items is None and hasattr(value, "__dict__"):
        items = list(vars(value).values())
    for item in items or ():
        _share_what_cannot_be_copied(item, memo, entered)
    if not _can_be_copied(value, memo):
        memo[id(value)] = value


def _can_be_copied(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def tensors_in(value: Any) -> list[Tensor]:
    """Lists the tensors in a tensor or in nested lists, tuples, mappings and dataclasses, in order.

    Args:
        value: Any value. A container that contains itself is entered once.

    Returns:
        The tensors. A tensor that occurs several times is listed several times.
    """
    found: list[Tensor] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Tensor], open_containers: set[int]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
        return
    items = _items(value)
    if items is not None and id(value) not in open_containers:
        open_containers.add(id(value))
        for item in items:
            _collect(item, found, open_containers)
        open_containers.discard(id(value))


def _items(value: Any) -> Iterable[Any] | None:
    """Returns the items of a container, or None if the value is not a container."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return None


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to every tensor of a nested value. Containers are copied, never changed.

    A copied container keeps its type and its other attributes, for example ``defaultdict``, a named tuple or a subclass
    of ``dict`` whose constructor takes other arguments.

    Args:
        function: The function that is applied to each tensor.
        value: A tensor, or nested lists, tuples, mutable mappings and dataclasses of tensors. Any other value is
            returned unchanged.

    Returns:
        The new value.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return _like_tuple(value, [map_tensors(function, item) for item in value])
    changed: Any
    if isinstance(value, list):
        changed = copy.copy(value)
        changed[:] = [map_tensors(function, item) for item in value]
        return changed
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(function, item)
        return changed
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):  # frozen dataclasses refuse plain assignment
                object.__setattr__(changed, field.name, map_tensors(function, getattr(value, field.name)))
        return changed
    return value


def _like_tuple(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of the type of another one, with other items."""
    if all(a is b for a, b in zip(value, items, strict=True)):
        return value  # a shape, for example
    try:
        made: Any = tuple.__new__(type(value), items)  # whatever the constructor of the type takes
    except TypeError:
        return type(value)(items)  # what torch.max and the like return
    if hasattr(value, "__dict__"):
        made.__dict__.update(value.__dict__)
    return made  # type: ignore[no-any-return]


def copied_in(dtype: torch.dtype | None, value: Any) -> Any:
    """Copies a nested value, with its floating point tensors in another dtype and without their graphs.

    Args:
        dtype: The dtype of the floating point tensors in the copy; None for their own.
        value: As for :func:`map_tensors`.

    Returns:
        The copy. No tensor shares its memory with the original.
    """

    def copied(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(wanted, copy=True)

    return map_tensors(copied, value)


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, of which this process holds one shard."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gathers the whole of a sharded tensor; returns any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def add_whole(shard: Tensor, tensor: Tensor) -> None:
    """Adds a tensor that every process has as a whole to a sharded tensor."""
    from torch.distributed.tensor import distribute_tensor

    shard.add_(distribute_tensor(tensor, shard.device_mesh, shard.placements))  # type: ignore[attr-defined]
