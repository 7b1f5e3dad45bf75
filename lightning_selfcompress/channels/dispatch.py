"""Modes that show operations as they run, and contexts in which none are shown or compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


class ShowOperations(TorchDispatchMode):
    """Shows every operation after it has run, except the operations of a backward pass.

    Of an operation that calls functions, such as a branch or attention with scores of one's own, the operations within
    these functions are shown as well.
    """

    supports_higher_order_operators = True

    def __init__(self, visit: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visit = visit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            args = tuple(self._shown(a) if callable(a) and not isinstance(a, Tensor) else a for a in args)
        elif torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # without autograd, a composite operation arrives before it is decomposed
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:
            self._visit(func, args, kwargs, out)
        return out

    def _shown(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that calls another one and shows its operations, except while it is traced."""

        def shown(*args: Any, **kwargs: Any) -> Any:
            with self if _get_current_dispatch_mode() is None else nullcontext():
                return function(*args, **kwargs)

        return shown


class ShowScaledAttention(TorchFunctionMode):
    """Shows the query of every attention that scales by the number of features.

    With dropout, the attention arrives as several operations, of which one multiplies with a number.
    """

    def __init__(self, visit: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            self._visit(args[0] if args else kwargs["query"])
        return out


def unwatched() -> AbstractContextManager[Any]:
    """Returns a context for the operations of this package within a training step, which no watcher sees."""
    return _disable_current_modes()


class Shared:
    """A context that switches something for all threads: the first to enter switches, the last to leave switches back.

    Args:
        make: Makes the context that switches and undoes it.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._stack = make, ExitStack()
        self._lock, self._users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._stack.enter_context(self._make())
            self._users += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


def _force_eager() -> AbstractContextManager[Any]:
    if hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    from torch._dynamo import config

    patched: AbstractContextManager[Any] = config.patch(disable=True)
    return patched


_eager = Shared(_force_eager)


@contextmanager
def _step_by_step() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


_unfused = Shared(_step_by_step)


def unfused() -> AbstractContextManager[None]:
    """Runs torch's transformer layers step by step within this context, in evaluation mode too."""
    return _unfused


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled modules uncompiled within this context, since a compiled graph is one opaque operation."""
    return _eager


@contextmanager
def showing(visit: Callable[..., None]) -> Iterator[None]:
    """Shows every operation within this context, of compiled modules and of torch's transformer layers too."""
    with uncompiled(), unfused(), ShowOperations(visit):
        yield
