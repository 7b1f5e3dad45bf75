"""Removal while a Trainer runs: watch a training step, fade what is dead, take it out at the end of an epoch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.fading import Fading
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import Shrunk, remove
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tensors import map_tensors
from lightning_selfcompress.training.lightning_private import averaged_models
from lightning_selfcompress.training.sandbox import copied_arguments, proves_nothing, put_into_sandbox
from lightning_selfcompress.training.strategies import unwrapped


class RemovalSchedule:
    """What is known of a module's channels while it trains, and when and how they go.

    Args:
        module: A converted LightningModule.
        every_n_epochs: Epochs from one removal to the next, >= 1.
        round_to: Widths are kept at multiples of this.
        state: What :meth:`state_dict` of an earlier training returned, to go on from there. The state of a module with
            other sizes is ignored.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        every_n_epochs: int = 1,
        round_to: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.channels: Channels | None = None
        self._every_n_epochs, self._round_to = every_n_epochs, round_to
        self._overdue = False  # a removal that was due before there was a batch to prove it with
        self._told: set[str] = set()
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
        """Prepares the next training step to be captured; while parameters are unseen, steps 1, 2, 4, 8 are watched."""
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
            if proves_nothing((args, kwargs)):
                self._batches -= 1  # the next one takes its place
                return method(*args, **kwargs)  # type: ignore[operator]
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
        """Fades the constants of dead channels; returns whether the channels have just become known."""
        self._restore()
        found = self._watcher is not None and self.channels is not None and not self.channels.unseen
        if found:
            self._settle(module)
        if self._fading is not None:
            self._fading.step()
        return found

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the arguments of a training step, with which plans are proved; a step may take its batch apart."""
        self._step = map_tensors(lambda tensor: tensor, (args, kwargs))

    def close(self) -> None:
        """Gives the module its own ``training_step`` back and forgets the captured batch."""
        self._restore()
        self._watcher = self._step = None

    def is_due(self, epoch: int) -> bool:
        """Whether channels are to be removed at the end of an epoch; without a batch as proof the next one makes up."""
        due = (epoch + 1) % self._every_n_epochs == 0
        self._overdue = due and not self.captured
        return due and not self._overdue

    def makes_up_for(self, module: nn.Module, batch: Any, batch_idx: int) -> bool:
        """Whether a removal is overdue that the batch which is about to run can prove."""
        if not self._overdue or proves_nothing(batch):
            return False
        self.capture(*step_arguments(module, batch, batch_idx))
        self._overdue = False
        return True

    def carry_out(self, trainer: Any, module: nn.Module) -> list[Shrunk]:
        """Removes dead channels of the module, of its averages and of its optimizers, alike in all processes.

        Args:
            trainer: The Trainer. The first process plans and proves, the others follow.
            module: The module in training.

        Returns:
            What has become smaller.
        """
        plan = self._plan(trainer, module) if trainer.is_global_zero else RemovalPlan()
        pinned = self.channels.pinned if self.channels is not None else {}
        plan, pinned = trainer.strategy.broadcast((plan, dict(pinned)))
        self._tell(plan, trainer.current_epoch)
        if self.channels is not None:
            self.channels = replace(self.channels, pinned=pinned)
        if not plan:
            if self._fading is not None:  # what was refuted neither fades nor pays
                self._note_channels(module, averaged_models(trainer.callbacks))
            return []
        with unwrapped(trainer.strategy, module):
            shrunk = self._apply(plan, module, averaged_models(trainer.callbacks))
        for optimizer in trainer.optimizers:
            shrink_optimizer(optimizer, shrunk)
        torch.compiler.reset()  # graphs of the larger network count towards dynamo's limit, after which all is eager
        self._tell_replaced([record.name for record in shrunk if record.new is not record.old])
        return shrunk

    def _plan(self, trainer: Any, module: nn.Module) -> RemovalPlan:
        """Plans what goes now, proved by a dry run of the captured step on copies."""
        if self.channels is None:
            return RemovalPlan()
        plan = plan_removal(module, self.channels, round_to=self._round_to)

        def replay(net: nn.Module, dtype: torch.dtype) -> Any:
            if self._step is None:
                raise RuntimeError("no training step was captured")
            put_into_sandbox(net, trainer)
            args, kwargs = copied_arguments(self._step, dtype)
            return net.training_step(*args, **kwargs)  # type: ignore[operator]

        proved, self.channels = prove(module, self.channels, plan, replay)
        if plan and not proved:
            self._step = None  # another batch may prove what this one does not
        return proved

    def _apply(self, plan: RemovalPlan, module: nn.Module, copies: Iterable[nn.Module]) -> list[Shrunk]:
        """Takes the planned channels out of the module and of its copies."""
        shrunk = remove(module, plan.edits)
        copies = list(copies)
        for copied in copies:
            remove(copied, plan.edits)
        if self.channels is not None:
            self.channels = self.channels.without_numbers(plan.channels)
            self._note_channels(module, copies)
        return shrunk

    def _note_channels(
        self, module: nn.Module, copies: Iterable[nn.Module] = (), *, left: Tensor | None = None
    ) -> None:
        """Has fading and the size go by the channels as they are known now; ``left`` is for the first time."""
        assert self.channels is not None
        self._fading = Fading(module, self.channels, left=left if self._fading is None else self._fading.left)
        for network in (module, *copies):
            couple(network, self.channels)

    def _tell(self, plan: RemovalPlan, epoch: int) -> None:
        """Says what goes, and why dead channels stay, the latter once."""
        lines = [plan.summary] if plan else []
        lines += [line for line in plan.refusals if line not in self._told]
        self._told.update(plan.refusals)
        for line in lines:
            rank_zero_info(f"SelfCompression, epoch {epoch}: {line}")

    def _tell_replaced(self, names: list[str]) -> None:
        """Says once which parameters are other objects now."""
        if names and "replaced" not in self._told:
            self._told.add("replaced")
            rank_zero_warn(
                f"SelfCompression: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} had to be replaced by new "
                f"parameters, since something keeps a graph that was recorded with their old shapes, such as a loss in "
                f"a list: what you hold of the old ones is not trained any more. Detach what you keep of a step."
            )

    def _recall(self, module: nn.Module, state: Mapping[str, Any]) -> Tensor | None:
        """Takes up the channels of an earlier training; returns how many steps they had left to fade."""
        channels = Channels.from_state_dict(state["channels"]) if state["channels"] is not None else None
        if channels is None or not channels.describes(module):
            return None
        self.channels, self._batches = channels, state["batches"]
        left: Tensor | None = state["left"]
        return left

    def _settle(self, module: nn.Module, left: Tensor | None = None) -> None:
        """Stops watching, since all channels are known, and begins to fade the constants of dead channels."""
        self._watcher = None
        self._note_channels(module, left=left)


def step_arguments(module: nn.Module, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning calls ``training_step`` with."""
    takes_index = "batch_idx" in signature(module.training_step).parameters  # type: ignore[arg-type]
    return (batch, batch_idx) if takes_index else (batch,)
