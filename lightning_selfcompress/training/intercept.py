"""A method of a module that is intercepted once, on the instance, whoever calls it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

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
    method, earlier = getattr(module, name), module.__dict__.get(name)
    waits = True

    def restore() -> None:
        nonlocal waits
        if waits:
            waits = False
            module.__dict__.pop(name, None)
            if earlier is not None:
                module.__dict__[name] = earlier

    @wraps(method)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        restore()
        return around(method, args, kwargs)

    module.__dict__[name] = intercepted
    return restore
