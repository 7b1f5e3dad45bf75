"""A method of a module that is intercepted once, on the instance, whoever calls it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from lightning_selfcompress.tensors import base_named, put_on

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def intercept(module: nn.Module, name: str, around: Around) -> Callable[[], None]:
    """Has ``around(method, args, kwargs)`` run in place of the next call of a module's method.

    Args:
        module: A module.
        name: Name of the method.
        around: Returns what the method is to return, and calls it itself.

    Returns:
        A function that takes the interception back if the method was not called.
    """
    method = getattr(module, name)
    waits = True

    def restore() -> None:
        nonlocal waits
        if waits:
            waits = False
            take_off()

    @wraps(method)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        restore()
        return around(method, args, kwargs)

    take_off = put_on(module, name, intercepted)
    return restore


def overrides(module: nn.Module, name: str) -> bool:
    """Returns whether a module defines a method of LightningModule itself; two packages have such a class."""
    base = base_named(type(module), "LightningModule")
    return name in module.__dict__ or getattr(type(module), name) is not getattr(base, name)
