"""Removal while a Trainer runs: watch a training step, fade what is dead, take it out at the end of an epoch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.fading import Fading
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import Edit, Shrunk, remove
from lightning_selfcompress.training.sandbox import _cast, _sandbox

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class Removal:
    """What is known of a module's channels while it trains, and how they go.

    Args:
        module: A converted LightningModule.
        round_to: Widths are kept at multiples of this.
        state: What :meth:`state_dict` of an earlier training said, to go on from there. What it says of a module of
            other sizes is of no use.
    """

    def __init__(self, module: nn.Module, *, round_to: int = 1, state: Mapping[str, Any] | None = None) -> None:
        self.channels: Channels | None = None
        self._round_to = round_to
        self._fading: Fading | None = None
        self._step: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._batches = 0
        self._restore: Callable[[], None] = lambda: None
        left = self._recall(module, state) if state is not None else None
        self._watcher: Watcher | None = Watcher(module, earlier=self.channels)
        if self.channels is not None and not self.channels.unseen:
            self._settle(module, left)

    @property
    def captured(self) -> bool:
        """Whether there is a training step to prove a plan with."""
        return self._step is not None

    def state_dict(self) -> dict[str, Any]:
        """What is known of the channels, in lists and tensors."""
        return {
            "channels": self.channels.state_dict() if self.channels is not None else None,
            "left": self._fading.left.cpu() if self._fading is not None else None,
            "batches": self._batches,
        }

    def before_batch(self, module: nn.Module) -> None:
        """Has the next training step captured, and watched while parameters are unseen: steps 1, 2, 4, 8, ..."""
        self._restore()  # a batch that was skipped left its step watched
        self._batches += 1
        watcher = self._watcher if not self._batches & (self._batches - 1) else None
        if self.captured and watcher is None:
            return
        method, earlier = module.training_step, module.__dict__.get("training_step")

        def restore() -> None:
            module.__dict__.pop("training_step", None)
            if earlier is not None:
                module.__dict__["training_step"] = earlier
            self._restore = lambda: None

        @wraps(method)  # type: ignore[arg-type]
        def watched(*args: Any, **kwargs: Any) -> Any:
            restore()
            self.capture(*args, **kwargs)
            if watcher is None:
                return method(*args, **kwargs)  # type: ignore[operator]
            with watcher:
                outputs = method(*args, **kwargs)  # type: ignore[operator]
                watcher.pin_outputs(outputs, "training_step returns it")
            if outputs is not None or not getattr(module, "automatic_optimization", True):
                self.channels = watcher.channels()  # a step without loss does not say what its outputs are for
            return outputs

        module.__dict__["training_step"] = watched
        self._restore = restore

    def after_batch(self, module: nn.Module) -> bool:
        """Fades; returns whether the channels have just become known."""
        self._restore()
        found = self._watcher is not None and self.channels is not None and not self.channels.unseen
        if found:
            self._settle(module)
        if self._fading is not None:
            self._fading.step()
        return found

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the arguments of a training step, which plans are proved with."""
        self._step = args, kwargs

    def close(self) -> None:
        """Leaves the module as it was, whatever happened in a step, and lets go of the captured batch."""
        self._restore()
        self._watcher = self._step = None

    def plan(self, trainer: Any, module: nn.Module) -> RemovalPlan:
        """What goes now, proved by a dry run of the captured step on a copy."""
        if self.channels is None:
            return RemovalPlan()
        plan = plan_removal(module, self.channels, round_to=self._round_to)
        plan, self.channels = prove(module, self.channels, plan, lambda net, dtype: self._replay(trainer, net, dtype))
        return plan

    def apply(self, module: nn.Module, edits: Sequence[Edit], numbers: Sequence[int]) -> list[Shrunk]:
        """Takes the planned channels out of the module; returns the parameters that were replaced."""
        shrunk = remove(module, edits)
        torch.compiler.reset()  # graphs of the larger network count towards dynamo's limit, after which all is eager
        if self.channels is not None:
            gone = np.zeros(self.channels.count, bool)
            gone[list(numbers)] = True
            self.channels = self.channels.without(gone)
            self._fading = Fading(module, self.channels, left=self._fading.left if self._fading is not None else None)
        return shrunk

    def _recall(self, module: nn.Module, state: Mapping[str, Any]) -> Tensor | None:
        """Takes up the channels of an earlier training; returns how many steps they had left to fade."""
        channels = Channels.from_state_dict(state["channels"]) if state["channels"] is not None else None
        if channels is None or not channels.describes(module):
            return None
        self.channels, self._batches = channels, state["batches"]
        left: Tensor | None = state["left"]
        return left

    def _settle(self, module: nn.Module, left: Tensor | None = None) -> None:
        """All channels are known: nothing is watched any more, and what is dead fades."""
        assert self.channels is not None
        self._watcher = None
        self._fading = Fading(module, self.channels, left=left)

    def _replay(self, trainer: Any, net: nn.Module, dtype: torch.dtype) -> Any:
        """The captured training step on a copy that logs nothing and steps no optimizer."""
        if self._step is None:
            raise RuntimeError("no training step was captured")
        for name in _STEPS:  # compiled ones are bound to the module they were compiled from
            net.__dict__.pop(name, None)
        net.__class__ = _sandbox(type(net))
        with suppress(AttributeError):
            net.trainer = trainer
        args, kwargs = (_cast(value, dtype) for value in self._step)
        return net.training_step(*args, **kwargs)  # type: ignore[operator]


def step_arguments(module: nn.Module, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning calls ``training_step`` with."""
    takes_index = "batch_idx" in signature(module.training_step).parameters  # type: ignore[arg-type]
    return (batch, batch_idx) if takes_index else (batch,)
