"""Optimizer steps within a watched step, during which nothing is watched, except in the closures that they call.

Torch's hooks on the steps of all optimizers are global, and a hook that is registered in one thread may break the loop
over the hooks in another. They are registered once, when this file is imported, and look up the thread's own watcher.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class OptimizerSteps:
    """Tells whether an optimizer is taking a step in the thread that entered :meth:`noticed`."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def running(self) -> bool:
        """Whether an optimizer is taking a step now, outside its closure."""
        return self._depth > 0

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notices the optimizer steps of this thread within this context."""
        earlier, _of_thread.steps = _of_thread.steps, self
        try:
            yield
        finally:
            _of_thread.steps, self._depth = earlier, 0

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._depth += 1
        closures = {name: self._outside(value) for name, value in kwargs.items() if callable(value)}
        return tuple(self._outside(a) if callable(a) else a for a in args), {**kwargs, **closures}

    def _end(self) -> None:
        self._depth = max(0, self._depth - 1)

    def _outside(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(closure)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            depth, self._depth = self._depth, 0
            try:
                return closure(*args, **kwargs)
            finally:
                self._depth = depth

        return wrapped


class _OfThread(threading.local):
    steps: OptimizerSteps | None = None


_of_thread = _OfThread()


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None if _of_thread.steps is None else _of_thread.steps._begin(args, kwargs)


def _after(*_: Any) -> None:
    if _of_thread.steps is not None:
        _of_thread.steps._end()


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
