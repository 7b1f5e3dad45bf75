"""The sandbox of a dry run: a copy of a module that reaches nothing outside itself, and its own copy of a batch."""

import io
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.removal.trial import random_states_kept
from lightning_selfcompress.tensors import SIZES, copied_in, is_a, map_tensors, tensors_in
from lightning_selfcompress.training.outside import Outside, OutsideError
from lightning_selfcompress.training.stand_in import Nothing, stand_in_for

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")
_SILENCED = (
    "toggle_optimizer",
    "untoggle_optimizer",
    "toggled_optimizer",
    "clip_gradients",
    "lr_schedulers",
    "lr_scheduler_step",
    "print",
)
_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class CapturedStep:
    """A step that was run, with what is needed to run it again on a copy.

    Args:
        name: Name of the module's method.
        args: Its positional arguments; the containers are copies, the tensors are not.
        kwargs: Its keyword arguments.
        values: What the Trainer said at the time: ``global_step`` and ``current_epoch``.
        attributes: The plain attributes of the modules at the time, by which a step may choose what it does.
        random_states: The states of the generators of Python, NumPy and torch at the time, by which it may choose too.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    random_states: tuple[Any, Any, Tensor] | None = None

    @classmethod
    def of(cls, module: nn.Module, trainer: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> "CapturedStep":
        """Captures a step that is about to run, with all by which it may choose what it does."""
        attributes = {
            path: {n: v for n, v in vars(m).items() if isinstance(v, _PLAIN) and n != "training"}
            for path, m in module.named_modules()
            if not any(True for _ in m._parameters)
        }
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return replace(cls.of_batch(trainer, name, args, kwargs), attributes=attributes, random_states=states)

    @classmethod
    def of_batch(cls, trainer: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> "CapturedStep":
        """Captures the arguments of a step that is about to run; the step may take its batch apart."""
        args, kwargs = map_tensors(lambda tensor: tensor, (args, dict(kwargs)))
        return cls(name, args, kwargs, {"global_step": trainer.global_step, "current_epoch": trainer.current_epoch})

    def arguments(self, dtype: torch.dtype | None) -> Any:
        """Returns the arguments once more, in tensors that share no memory with these.

        Args:
            dtype: The dtype of floating point tensors; None for their own.

        Raises:
            TypeError: If one of them is an iterator, which can be read once only.
        """
        if any(hasattr(value, "__next__") for value in (*self.args, *self.kwargs.values())):
            raise TypeError(f"{self.name} takes an iterator over batches, which cannot be repeated")
        return copied_in(dtype, (self.args, dict(self.kwargs)))

    def of_few(self, count: int) -> "CapturedStep | None":
        """Returns the same step with the first examples of its batch alone; None if it has no more, or is no batch.

        A batch is taken for one if the first dimension of all its tensors is of one size.

        Args:
            count: How many examples.
        """
        arguments = self.args, dict(self.kwargs)
        tensors = [t for t in tensors_in(arguments) if t.dim()]
        if {len(t) for t in tensors} != {max(map(len, tensors), default=0)} or len(tensors[0]) <= count:
            return None
        args, kwargs = map_tensors(lambda t: t[:count] if t.dim() else t, arguments)
        few = replace(self, args=args, kwargs=kwargs)
        return None if proves_nothing((args, kwargs)) else few


class Sandbox:
    """Runs steps of a module on copies of it, and leaves everything else as it was.

    Args:
        module: A LightningModule.
        trainer: Its Trainer.
    """

    def __init__(self, module: nn.Module, trainer: Any) -> None:
        self._module, self._trainer = module, trainer
        self._outside = Outside(module, [*trainer.callbacks, getattr(trainer, "datamodule", None)])

    def run(
        self,
        copied: nn.Module,
        step: CapturedStep,
        dtype: torch.dtype | None,
        watcher: Watcher | None = None,
    ) -> tuple[Any, list[Tensor]]:
        """Runs a step on a copy of the module.

        Args:
            copied: The copy, in the mode in which the step is to run.
            step: The step.
            dtype: The dtype of the floating point tensors in the arguments; None for their own.
            watcher: A watcher of the copy, which pins what the step returns.

        Returns:
            What the step returned, and what it logged, as tensors.

        Raises:
            OutsideError: If the step touches what cannot be put back.
        """
        logged: list[Tensor] = []
        self._put_in(copied, step, logged)
        args, kwargs = step.arguments(dtype)
        with self._outside.left_alone(), _at_random_states(step.random_states), watcher or nullcontext():
            returned = getattr(copied, step.name)(*args, **kwargs)
            if watcher is not None:
                watcher.pin_outputs(returned, f"{step.name} returns it")
        return returned, logged

    def _put_in(self, copied: nn.Module, step: CapturedStep, logged: list[Tensor]) -> None:
        stand_in = stand_in_for(self._trainer, self._module, copied, step.values)
        pairs = zip(self._module.named_modules(), copied.named_modules(), strict=True)
        for (path, original), (_, part) in pairs:
            _share_no_iterator(original, part)
            smaller = part.__dict__.get(SIZES, {})  # changed by a removal, not by the code of the module
            part.__dict__.update({n: v for n, v in step.attributes.get(path, {}).items() if n not in smaller})
            if is_a(part, "LightningModule"):
                for name in STEPS:  # compiled ones are bound to the module they were compiled from
                    part.__dict__.pop(name, None)
                part.__class__ = sandboxed_class(type(part))
                part.__dict__["_logged"] = logged
        with suppress(AttributeError):
            copied.trainer = stand_in  # type: ignore[assignment]


@contextmanager
def _at_random_states(states: tuple[Any, Any, Tensor] | None) -> Iterator[None]:
    """Goes on from some states of the random generators, and restores the present ones."""
    with random_states_kept():
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        yield


def sandboxed_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass of a LightningModule's class that reaches nothing outside itself."""
    if getattr(module_class, "_is_sandbox", False):
        return module_class

    def optimizers(self: Any, *_: Any, **__: Any) -> Any:
        found = list(self.trainer.optimizers)
        return found[0] if len(found) == 1 else found

    def nothing(self: Any, *_: Any, **__: Any) -> Any:
        return Nothing()

    def note(self: Any, name: str, value: Any, *_: Any, **__: Any) -> None:
        self._logged.extend(_as_tensors(value))

    def note_all(self: Any, values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for value in values.values():
            self._logged.extend(_as_tensors(value))

    def backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:
            loss.backward(*args, **{**kwargs, "retain_graph": True})

    def all_gather(self: Any, data: Any, *_: Any, **__: Any) -> Any:
        processes = self.trainer.world_size
        return map_tensors(lambda t: torch.stack([t] * processes), data) if processes > 1 else data

    body: dict[str, Any] = dict.fromkeys(_SILENCED, nothing) | {"optimizers": optimizers, "_is_sandbox": True}
    body |= {"log": note, "log_dict": note_all, "manual_backward": backward, "all_gather": all_gather}
    body |= {name: property(lambda self: Nothing()) for name in ("logger", "loggers")}
    return type(f"DryRun{module_class.__name__}", (module_class,), body)


def _as_tensors(value: Any) -> Iterable[Tensor]:
    """Returns what is logged as tensors, but no whole numbers, such as a count of parameters."""
    if isinstance(value, float):
        return [torch.tensor(value, dtype=torch.float64)]
    return tensors_in(value)


def _share_no_iterator(original: nn.Module, copied: nn.Module) -> None:
    """Replaces in a copy the iterators that could not be copied, for what is taken from them is gone."""
    for name, value in vars(original).items():
        if hasattr(type(value), "__next__") and not isinstance(value, io.IOBase) and copied.__dict__.get(name) is value:
            copied.__dict__[name] = _Untaken(name)


class _Untaken:
    """Stands for an iterator that cannot be copied."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> "_Untaken":
        return self

    def __next__(self) -> Any:
        raise OutsideError(f"the step takes from {self._name!r}, an iterator that cannot be rewound")


def proves_nothing(arguments: Any) -> bool:
    """Returns whether the arguments of a step prove no removal: there are no samples, or no finite numbers.

    A tensor with some numbers that are not finite (missing values, masks) is as good as any; so is one that is empty
    beside others that are not (an image without boxes).

    Args:
        arguments: Tensors, or containers of tensors.
    """
    tensors = [t for t in tensors_in(arguments) if t.dim()]
    floats = [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    empty = bool(tensors) and all(t.numel() == 0 for t in tensors)
    return empty or any(not bool(t.isfinite().any()) for t in floats)
