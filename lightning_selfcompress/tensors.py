"""Names, classes and tensors of modules, and the tensors in nested values."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by name; names that are registered as None are left out."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def name_of(path: str, name: str) -> str:
    """The name in the network of what the module at ``path`` calls ``name``."""
    return f"{path}.{name}".lstrip(".")


def is_a(thing: object, class_name: str) -> bool:
    """Whether an object is of a class of this name, or of a subclass, whichever package the class comes from.

    Lightning has two packages, ``lightning`` and ``pytorch_lightning``, whose classes of one name are different
    classes; and torch has moved some of its classes from module to module.
    """
    return base_named(type(thing), class_name) is not None


def base_named(kind: type, class_name: str) -> type | None:
    """The class of this name among a class and its bases; None if there is none."""
    return next((base for base in kind.__mro__ if base.__name__ == class_name), None)


def is_bare_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer without tensors, whose size is a mere number."""
    return isinstance(module, NORMS) and not any(True for _ in own_tensors(module))


def size_attribute(module: nn.Module) -> str:
    """Name of the attribute of a normalization layer that says how many channels it has."""
    return "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"


def stored_tensors(model: nn.Module, *, transient: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once, under the first of its names.

    Args:
        model: Any module.
        transient: Whether buffers that are not saved count too.

    Returns:
        Latent weights under the names they have in a state dict; lazy parameters are left out.
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
    """A deep copy of a module with whatever attributes it has.

    A tensor that is kept with its graph is copied without it. What cannot be copied (a lock, a generator, an open
    file) is shared with the copy.

    Args:
        model: Any module; it is not changed.

    Returns:
        A module of the same class, with parameters and buffers of its own.
    """
    kept = [t for module in model.modules() for t in tensors_in(vars(module)) if not t.is_leaf]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # whatever an attribute's own copying raises
        for module in model.modules():
            state = module.__reduce_ex__(4)[2]  # a LightningModule leaves its Trainer out
            for name, value in state.items() if isinstance(state, dict) else ():
                if name not in _OF_EVERY_MODULE:
                    _share_what_cannot_be_copied(value, memo, set())
        return copy.deepcopy(model, memo)


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _share_what_cannot_be_copied(value: Any, memo: dict[int, Any], entered: set[int]) -> None:
    """Enters the smallest parts of a value that cannot be copied into a memo of ``copy.deepcopy``, as themselves."""
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
    """The tensors of a nested value: itself, or those in its lists, tuples, mappings and dataclasses, in order.

    Args:
        value: Anything. A container that contains itself is entered once.

    Returns:
        The tensors. One that is there several times is listed several times.
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
    """What a container contains; None if the value is no container."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return None


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nested value with every tensor replaced by the function of it. Containers are copied, never changed.

    A container keeps its type and whatever else it holds: its constructor is not called, so a ``defaultdict``, a named
    tuple or a subclass of ``dict`` with arguments of its own comes out as what it was.

    Args:
        function: Applied to each tensor.
        value: A tensor, or lists, tuples, mappings and dataclasses of tensors. Anything else is returned unchanged.

    Returns:
        The new value.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple.__new__(type(value), [map_tensors(function, item) for item in value])
    changed: Any
    if isinstance(value, list):
        changed = copy.copy(value)
        changed[:] = [map_tensors(function, item) for item in value]
        return changed
    if isinstance(value, dict):
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
