"""The sandbox of a dry run: a module that reaches nothing outside itself, and its own copy of a batch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lightning_selfcompress.tensors import copied_in, tensors_in

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_SILENCED = (
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
)


def put_into_sandbox(copied: nn.Module, trainer: Any) -> None:
    """Makes the copy of a LightningModule reach nothing outside itself: no logger, no optimizer, no schedule.

    Args:
        copied: The copy.
        trainer: The Trainer of the original, which the copy's step may ask for numbers.
    """
    for name in _STEPS:  # compiled ones are bound to the module they were compiled from
        copied.__dict__.pop(name, None)
    copied.__class__ = sandboxed_class(type(copied))
    with suppress(AttributeError):
        copied.trainer = trainer


def sandboxed_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a LightningModule's class that reaches nothing outside itself."""
    if getattr(module_class, "_is_sandbox", False):
        return module_class

    def optimizers(self: Any, *_: Any, **__: Any) -> Any:
        count = len(self.trainer.optimizers)
        return Nothing() if count == 1 else [Nothing() for _ in range(count)]

    def nothing(self: Any, *_: Any, **__: Any) -> Any:
        return Nothing()

    body: dict[str, Any] = dict.fromkeys(_SILENCED, nothing) | {"optimizers": optimizers, "_is_sandbox": True}
    body |= {name: property(lambda self: Nothing()) for name in ("logger", "loggers")}
    return type(f"DryRun{module_class.__name__}", (module_class,), body)


class Nothing:
    """Stands for loggers, optimizers and schedulers in a dry run: takes every call, does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does nothing."""
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


def proves_nothing(arguments: Any) -> bool:
    """Whether no removal can be proved with the arguments of a step: there are no samples, or no finite numbers.

    A tensor with some numbers that are not finite (missing values, masks) is as good as any; so is one that is empty
    beside others that are not (an image without boxes).

    Args:
        arguments: Tensors, or containers of tensors.
    """
    tensors = [t for t in tensors_in(arguments) if t.dim()]
    floats = [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    empty = bool(tensors) and all(t.numel() == 0 for t in tensors)
    return empty or any(not bool(t.isfinite().any()) for t in floats)


def copied_arguments(arguments: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype) -> Any:
    """The arguments of a step once more, with floating point numbers of another dtype.

    Args:
        arguments: Positional and keyword arguments.
        dtype: The type of the floating point tensors in the copy.

    Returns:
        Positional and keyword arguments. No tensor shares its memory with the original, and no container is the same.

    Raises:
        TypeError: If one of them is an iterator, which can be read once only.
    """
    args, kwargs = arguments
    if any(hasattr(value, "__next__") for value in (*args, *kwargs.values())):
        raise TypeError("training_step takes an iterator over batches, which cannot be repeated")
    return copied_in(dtype, arguments)
