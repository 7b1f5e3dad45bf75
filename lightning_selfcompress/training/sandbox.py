"""The sandbox of a dry run: a module that reaches nothing outside itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy of a batch, with its floating point numbers in another dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, dict):
        return type(value)({key: _cast(v, dtype) for key, v in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(v, dtype) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    if hasattr(value, "__next__"):
        raise TypeError("training_step takes an iterator over batches, which cannot be repeated")
    return value


class _Nothing:
    """Stands for loggers, optimizers and schedulers in a dry run: takes every call, does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to leave."""

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Calls the closure, for its forward pass."""
        return closure() if closure is not None else self


def _sandbox(module_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a LightningModule's class that reaches nothing outside itself."""
    if getattr(module_class, "_is_sandbox", False):
        return module_class

    def optimizers(self: Any, *_: Any, **__: Any) -> Any:
        count = len(self.trainer.optimizers)
        return _Nothing() if count == 1 else [_Nothing() for _ in range(count)]

    def nothing(self: Any, *_: Any, **__: Any) -> Any:
        return _Nothing()

    names = [
        "log",
        "log_dict",
        "manual_backward",
        "toggle_optimizer",
        "untoggle_optimizer",
        "toggled_optimizer",
        "clip_gradients",
        "lr_schedulers",
        "lr_scheduler_step",
        "print",
    ]
    body: dict[str, Any] = dict.fromkeys(names, nothing) | {"optimizers": optimizers, "_is_sandbox": True}
    body |= {name: property(lambda self: _Nothing()) for name in ("logger", "loggers")}
    return type(f"DryRun{module_class.__name__}", (module_class,), body)
