"""How operations are seen as they run: torch's dispatch modes, and contexts in which nothing is seen or compiled."""

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
            with self:  # without autograd, operations made of others arrive whole
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            self._visit(func, args, kwargs, out)
        return out


def unwatched() -> AbstractContextManager[Any]:
    """A context for operations of this package within somebody's step: no watcher sees them."""
    return _disable_current_modes()


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which compiled modules run as they were written, since a compiled graph is one opaque operation."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        from torch._dynamo import config

        with config.patch(disable=True):
            yield
