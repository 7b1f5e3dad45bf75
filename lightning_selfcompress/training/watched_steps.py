"""The steps of a module that were watched: what they say of its channels, and how they are run again."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.removal.trial import Replay
from lightning_selfcompress.tensors import copy_module, tensors_in
from lightning_selfcompress.training.intercept import overrides
from lightning_selfcompress.training.sandbox import CapturedStep, Sandbox

_MOST = 8  # kinds of training steps
_ENOUGH = 16  # examples of a batch that a removal is proved with
_BEFORE_ITS_RUN = "training_step", "captured"  # the kind of a step that has not been watched yet
_ELSEWHERE = ("validation_step", "test_step", "predict_step", "forward")


class WatchedSteps:
    """Watches steps of a module and keeps one of each kind, with which removals are proved.

    Steps are of one kind if they run the same operations and the same parameters: heads that take turns are kinds of
    their own.

    Args:
        module: A converted LightningModule.
        channels: What is known of its channels from an earlier training.

    Attributes:
        channels: What the steps have shown so far; None before the first one.
        trained: Whether a training step was watched, now or earlier.
        validated: Whether a validation step was watched, now or earlier.
    """

    def __init__(self, module: nn.Module, channels: Channels | None = None) -> None:
        self.channels = channels
        self.trained = channels is not None
        self.validated = False
        self._module = module
        self._steps: dict[Any, tuple[CapturedStep, bool]] = {}
        self._ran_forward = False
        self._rehearsed = False

    @property
    def captured(self) -> bool:
        """Whether there is a training step to prove a plan with."""
        return any(not evaluates for _, evaluates in self._steps.values())

    def run(
        self, trainer: Any, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a step and watches it.

        Args:
            trainer: The Trainer.
            name: ``"training_step"`` or ``"validation_step"``.
            method: The method of the module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the step returns.
        """
        step = CapturedStep.of(self._module, trainer, name, args, kwargs)
        watcher = Watcher(self._module, earlier=self.channels)
        with watcher:
            outputs = method(*args, **kwargs)
            watcher.pin_outputs(outputs, f"{name} returns it")
        training = name == "training_step"
        if training and outputs is None and getattr(self._module, "automatic_optimization", True):
            return outputs  # a step without loss does not say what its outputs are for
        self._ran_forward |= watcher.ran_forward
        self.channels = watcher.channels()
        self.trained |= training
        self.validated |= not training
        kind = (name, watcher.kind()) if training else (name, kwargs.get("dataloader_idx", args[2:]))
        if training:
            self._steps.pop(_BEFORE_ITS_RUN, None)
        kinds = sum(not evaluates for _, evaluates in self._steps.values())
        if not training or kind in self._steps or kinds < _MOST:
            self._steps[kind] = step, not training
        return outputs

    def capture(self, trainer: Any, arguments: tuple[Any, ...]) -> None:
        """Keeps a training step that is about to run, to prove a plan with before it does."""
        step = CapturedStep.of(self._module, trainer, "training_step", arguments, {})
        self._steps[_BEFORE_ITS_RUN] = step, False

    def foresee(self, trainer: Any, arguments: tuple[Any, ...]) -> Channels | None:
        """Returns what a training step that is about to run shows of the channels, from a copy; None if it fails there.

        Nothing is kept, so that the step itself is watched as if it were the first.
        """
        step = CapturedStep.of(self._module, trainer, "training_step", arguments, {})
        watched = WatchedSteps(self._module, self.channels)
        watched._watch_copy(Sandbox(self._module, trainer), step)
        return watched.channels

    def rehearse(self, sandbox: Sandbox) -> None:
        """Watches, on copies, the steps of evaluation that the module has and that have not been run yet.

        They are tried with the batches at hand. What cannot be run with them stays unseen.

        Args:
            sandbox: Where copies are run.
        """
        if self._rehearsed or not self._steps:
            return
        self._rehearsed = True
        for name in _ELSEWHERE:
            seen = self._ran_forward if name == "forward" else any(s.name == name for s, _ in self._steps.values())
            if seen or not overrides(self._module, name):
                continue
            for like in sorted((s for s, _ in self._steps.values()), key=lambda s: s.name == "training_step"):
                for step in _guesses(self._module, name, like):
                    if self._watch_copy(sandbox, step):
                        self.validated |= name == "validation_step"
                        self._steps[name] = step, True
                        break
                if name in self._steps:
                    break

    def replays(self, sandbox: Sandbox) -> list[Replay]:
        """Returns the steps that were kept, to be run again on copies."""

        def replay(step: CapturedStep) -> Callable[[nn.Module, torch.dtype], Any]:
            return lambda net, dtype: sandbox.run(net, step, dtype)

        return [
            Replay(replay(step), evaluates, replay(few) if (few := step.of_few(_ENOUGH)) is not None else None)
            for step, evaluates in self._steps.values()
        ]

    def forget_steps(self) -> None:
        """Forgets the training steps: another batch may prove what these do not."""
        self._steps = {kind: (step, evaluates) for kind, (step, evaluates) in self._steps.items() if evaluates}

    def _watch_copy(self, sandbox: Sandbox, step: CapturedStep) -> bool:
        """Watches a step on a copy; returns whether it could be run."""
        try:
            copied = copy_module(self._module).eval()
            watcher = Watcher(copied, earlier=self.channels)
            sandbox.run(copied, step, None, watcher)
        except Exception:  # a step may raise any exception on a batch that is not its own
            return False
        self.channels = watcher.channels()
        return True


def _guesses(module: nn.Module, name: str, like: CapturedStep) -> list[CapturedStep]:
    """Returns ways to run a step with the batch of another one."""

    def step(*args: Any, **kwargs: Any) -> CapturedStep:
        return CapturedStep(name, args, kwargs, like.values, like.attributes, like.random_states)

    batch = like.args[0] if like.args else next(iter(like.kwargs.values()), None)
    if name != "forward":
        return [step(batch, 0) if _takes_index(getattr(module, name)) else step(batch)]
    wanted = [p for p in signature(module.forward).parameters.values() if p.default is Parameter.empty]
    wanted = [p for p in wanted if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    if isinstance(batch, Mapping) and all(p.name in batch for p in wanted):
        return [step(**{p.name: batch[p.name] for p in wanted}), step(batch)]
    if isinstance(batch, list | tuple):
        return [step(*batch[: len(wanted)]), step(batch)]
    return [step(batch), *(step(tensor) for tensor in tensors_in(batch)[:1])]


def step_arguments(module: nn.Module, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Returns what Lightning calls ``training_step`` with."""
    return (batch, batch_idx) if _takes_index(module.training_step) else (batch,)


def _takes_index(step: Any) -> bool:
    """Returns whether a step takes the number of its batch, under whatever name."""
    parameters = signature(step).parameters.values()
    return len(parameters) > 1 or any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
