"""Names and tensors of modules, and the tensors in nested values."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result: itself, or those in lists, tuples and dictionaries, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by name, those that are there."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def name_of(path: str, name: str) -> str:
    """The name in the network of what a module at a path calls so."""
    return f"{path}.{name}".lstrip(".")


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
