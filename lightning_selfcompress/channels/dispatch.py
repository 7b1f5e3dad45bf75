"""A dispatch mode that shows operations as they run, and contexts in which none are shown or compiled."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


class ShowOperations(TorchDispatchMode):
    """Shows every operation after it has run, except the operations of a backward pass."""

    def __init__(self, visit: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visit = visit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # without autograd, a composite operation arrives before it is decomposed
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            self._visit(func, args, kwargs, out)
        return out


def unwatched() -> AbstractContextManager[Any]:
    """Returns a context for the operations of this package within a training step, which no watcher sees."""
    return _disable_current_modes()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled modules uncompiled within this context, since a compiled graph is one opaque operation."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        from torch._dynamo import config

        with config.patch(disable=True):
            yield
