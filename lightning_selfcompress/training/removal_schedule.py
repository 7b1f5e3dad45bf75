"""Removal while a Trainer runs: watch steps, fade what is dead, take it out at the end of an epoch."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.removal.copies import Copies
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.fading import Fading
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import FADING, TOGETHER, RemovalPlan, narrow, plan_removal
from lightning_selfcompress.removal.surgery import Shrunk, remove
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tensors import is_a
from lightning_selfcompress.training.intercept import intercept
from lightning_selfcompress.training.lightning_private import averaged_models
from lightning_selfcompress.training.messages import tell, warn
from lightning_selfcompress.training.sandbox import Sandbox, proves_nothing
from lightning_selfcompress.training.strategies import shards_parameters, unwrapped
from lightning_selfcompress.training.watched_steps import WatchedSteps, step_arguments

_NAMED = 4  # layers in the line that tells of a removal
_PATIENCE = 3  # epochs, where no end of the training is known


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
        self._every_n_epochs, self._round_to = every_n_epochs, round_to
        self._overdue = False  # a removal that was due before there was a batch to prove it with
        self._told: set[Any] = set()
        self._fading: Fading | None = None
        self._noted: Channels | None = None  # the channels by which fading and the size go
        self._batches = 0
        self._next = 1, 2  # the training batches to be watched next, in a series that meets every rhythm of steps
        self._loaders: set[Any] = set()  # of validation, a batch of which was watched
        self._restore: Callable[[], None] = lambda: None
        self._copies = Copies(module)
        self._steps = WatchedSteps(module)
        if state is not None:
            self._recall(module, state)

    @property
    def channels(self) -> Channels | None:
        """The channels as they are known; None before a step was watched."""
        return self._steps.channels

    def state_dict(self) -> dict[str, Any]:
        """What is known of the channels, in lists and tensors."""
        return {
            "channels": self.channels.state_dict() if self.channels is not None else None,
            "left": self._fading.left.cpu() if self._fading is not None else None,
            "batches": self._batches,
            "validated": self._steps.validated,
            "copies": dict(self._copies.followers),
        }

    def begin_epoch(self, module: nn.Module) -> None:
        """Begins anew where the module has other parts than before, or more of them are converted."""
        if self.channels is None or not self.channels.describes(module):
            self._forget(module)

    def before_batch(self, trainer: Any, module: nn.Module) -> None:
        """Prepares the next training step to be watched, if its turn has come."""
        self._restore()  # a batch that was skipped left its step watched
        self._batches += 1
        while self._batches > self._next[0]:
            self._next = self._next[1], sum(self._next)
        if not self._steps.captured or self._batches == self._next[0]:
            self._watch(trainer, module, "training_step")

    def look_ahead(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> Channels | None:
        """Returns the channels, if need be as a training step shows them that is about to run; None if it fails."""
        if self.channels is not None or proves_nothing(batch):
            return self.channels
        return self._steps.foresee(trainer, step_arguments(module, batch, batch_idx))

    def before_validation_batch(self, trainer: Any, module: nn.Module, dataloader_idx: int) -> None:
        """Prepares the next validation step to be watched, once for each data loader."""
        self._restore()
        if dataloader_idx not in self._loaders:
            self._watch(trainer, module, "validation_step", lambda: self._loaders.add(dataloader_idx))

    def after_batch(self, trainer: Any, module: nn.Module) -> bool:
        """Fades the constants of dead channels; returns whether more is known of the channels than before."""
        self._restore()
        found = self._take_note(trainer, module) if self._steps.trained else False
        self._copies.follow(module)
        if self._fading is not None:
            self._fading.step()
        return found

    def close(self) -> None:
        """Gives the module its own steps back and forgets the captured batches."""
        self._restore()
        kept = WatchedSteps(nn.Module(), self.channels)  # what a checkpoint holds of the steps
        kept.validated, self._steps = self._steps.validated, kept

    def is_due(self, epoch: int) -> bool:
        """Whether channels are to be removed at the end of an epoch; without a batch as proof the next one makes up."""
        due = (epoch + 1) % self._every_n_epochs == 0
        self._overdue = due and not self._steps.captured
        return due and not self._overdue

    def makes_up_for(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> bool:
        """Whether a removal is overdue that the batch which is about to run can prove."""
        if not self._overdue or proves_nothing(batch):
            return False
        self._steps.capture(trainer, step_arguments(module, batch, batch_idx))
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
        if self.channels is not None and not self.channels.describes(module):
            self._forget(module)  # a part was added since: the next batches show what it does
        plan = self._plan(trainer, module) if trainer.is_global_zero else RemovalPlan()
        plan, self._steps.channels = trainer.strategy.broadcast((plan, self.channels))
        self._tell(plan, trainer.current_epoch)
        copies = list(averaged_models(trainer.callbacks))
        if self._fading is not None:  # what was refuted neither fades nor pays; other processes take up the numbers
            self._note_channels(module, copies)
        if not plan:
            return []
        with unwrapped(trainer.strategy, module):
            shrunk = self._apply(plan, module, copies)
        for optimizer in trainer.optimizers:
            shrink_optimizer(optimizer, shrunk)
        torch.compiler.reset()  # graphs of the larger network count towards dynamo's limit, after which all is eager
        self._tell_replaced([record.name for record in shrunk if record.new is not record.old])
        return shrunk

    def _watch(self, trainer: Any, module: nn.Module, name: str, seen: Callable[[], None] = lambda: None) -> None:
        def around(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if proves_nothing((args, kwargs)):
                if name == "training_step":
                    self._batches -= 1  # the next one takes its place
                return method(*args, **kwargs)
            seen()
            if self.channels is not None and not self.channels.describes(module):
                self._forget(module)
            return self._steps.run(trainer, name, method, args, kwargs)

        self._restore = intercept(module, name, around)

    def _plan(self, trainer: Any, module: nn.Module) -> RemovalPlan:
        """Plans what goes now, proved by a dry run of the steps that were watched on copies."""
        if self.channels is None:
            return RemovalPlan()
        sandbox = Sandbox(module, trainer)
        self._steps.rehearse(sandbox)
        self._take_note(trainer, module, again=True)
        channels, waiting = self.channels, {}
        if not _is_last_epoch(trainer):
            waiting = {
                n: f"{name!r} could read it, which no step has run yet" for n, name in channels.waiting().items()
            }
            for n, path in self._copies.waiting(module, channels).items():
                waiting[n] = f"{path!r} has the same values and may be updated from it"
        plan = plan_removal(module, channels, round_to=self._round_to, waiting=waiting)
        if plan and trainer.enable_validation and not self._steps.validated:
            return narrow(module, channels, plan, (), "the first validation, which may use it, is still to come")
        proved, self._steps.channels = prove(module, channels, plan, self._steps.replays(sandbox) if plan else ())
        if plan and not proved:
            self._steps.forget_steps()
        return proved

    def _apply(self, plan: RemovalPlan, module: nn.Module, copies: Iterable[nn.Module]) -> list[Shrunk]:
        """Takes the planned channels out of the module and of its copies."""
        shrunk = remove(module, plan.edits)
        self._copies.renew(module, [record.name for record in shrunk])
        copies = list(copies)
        for copied in copies:
            remove(copied, plan.edits)
        if self.channels is not None:
            self._steps.channels = self.channels.without_numbers(plan.channels)
            self._note_channels(module, copies)
        return shrunk

    def _take_note(self, trainer: Any, module: nn.Module, *, again: bool = False) -> bool:
        """Adds what is known of copies, and has fading and the size go by it; returns whether anything is new."""
        if self.channels is None or (self.channels is self._noted and not again):
            return False
        averaged = list(averaged_models(trainer.callbacks))
        others = [
            (f"{type(callback).__name__} (callback {i})", callback)
            for i, callback in enumerate(trainer.callbacks)
            if not is_a(callback, "SelfCompression")
        ]
        channels = self._copies.note(module, self.channels, others, averaged)
        if not channels.differs_from(self._noted):
            self._steps.channels = self._noted  # so that the next batch sees at once that nothing is new
            return False
        self._steps.channels = channels
        self._note_channels(module, averaged)
        for sentence in self._copies.told:
            if sentence not in self._told:
                self._told.add(sentence)
                tell(f"SelfCompression: {sentence}")
        return True

    def _note_channels(self, module: nn.Module, copies: Iterable[nn.Module] = (), left: Tensor | None = None) -> None:
        """Has fading and the size go by the channels as they are known now; ``left`` is for the first time."""
        assert self.channels is not None
        if self._fading is not None:
            left = _carried(self._fading.left, self._noted, self.channels)
        self._fading = Fading(module, self.channels, left=left)
        self._noted = self.channels
        for network in (module, *copies):
            couple(network, self.channels)

    def _forget(self, module: nn.Module) -> None:
        """Begins to watch anew."""
        self._restore()
        self._steps = WatchedSteps(module)
        self._fading = self._noted = None
        self._batches, self._next, self._loaders = 0, (1, 2), set()
        self._copies = Copies(module)

    def _tell(self, plan: RemovalPlan, epoch: int) -> None:
        """Says what goes in one line, and once why dead channels stay, unless they are only fading."""
        if plan:
            tell(f"SelfCompression, epoch {epoch}: {_short(plan)}")
        tell(f"SelfCompression, epoch {epoch}: {plan}", logging.DEBUG)
        for reason, line in zip(plan.refused, plan.refusals, strict=True):
            layer, why = reason
            said = (layer, TOGETHER) if why.startswith(TOGETHER) else reason  # whatever their number, and with whom
            if said not in self._told and why != FADING:
                self._told.add(said)
                tell(f"SelfCompression, epoch {epoch}: {line}")

    def _tell_replaced(self, names: list[str]) -> None:
        """Says once which parameters are other objects now."""
        if names and "replaced" not in self._told:
            self._told.add("replaced")
            warn(
                f"SelfCompression: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} had to be replaced by new "
                f"parameters, since something keeps a graph that was recorded with their old shapes, such as a loss in "
                f"a list: what you hold of the old ones is not trained any more. Detach what you keep of a step."
            )

    def _recall(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Takes up the channels of an earlier training, and the steps that its constants had left to fade."""
        channels = Channels.from_state_dict(state["channels"]) if state["channels"] is not None else None
        if channels is None or not channels.describes(module):
            return
        self._steps = WatchedSteps(module, channels)
        self._steps.validated, self._batches = state["validated"], state["batches"]
        self._copies.followers.update(state["copies"])
        if state["left"] is not None:
            self._note_channels(module, left=state["left"])


def _carried(left: Tensor, before: Channels | None, now: Channels) -> Tensor:
    """Returns the steps that channels have left to fade, by their new numbers."""
    if before is None or before.group is now.group or len(before.group) != len(now.group):
        return left  # a removal leaves the numbers as they are
    carried = np.full(now.count, np.inf, np.float32)
    np.minimum.at(carried, now.group, left.cpu().numpy()[before.group])
    carried[np.isinf(carried)] = left.max().item() if len(left) else 0.0
    return torch.from_numpy(carried).to(left.device)


def _short(plan: RemovalPlan) -> str:
    """Returns what a plan removes, with the widths of the layers that lose most."""
    most = sorted(plan.widths.items(), key=lambda item: item[1][1] - item[1][0])[:_NAMED]
    names = [f"{name} {before} -> {after}" for name, (before, after) in most]
    names += [f"and {len(plan.widths) - _NAMED} more layers"] if len(plan.widths) > _NAMED else []
    channels = len(plan.channels)
    text = f"removed {channels:,} channel{'s' * (channels != 1)}, {plan.weights:,} weights"
    return f"{text} ({', '.join(names)})" if names else text


def _is_last_epoch(trainer: Any) -> bool:
    """Whether no epoch follows; where no end is known, whether enough have passed to show what there is."""
    if trainer.should_stop or (trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps):
        return True
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return bool(trainer.current_epoch + 1 >= trainer.max_epochs)
    return bool(trainer.max_steps <= 0 and trainer.current_epoch + 1 >= _PATIENCE)


def start_removal(
    trainer: Any, module: nn.Module, *, every_n_epochs: int, round_to: int, state: Mapping[str, Any] | None
) -> RemovalSchedule | None:
    """Returns the removal of a training; None if nothing is to be removed, or the strategy does not allow it.

    Args:
        trainer: The Trainer.
        module: The converted module.
        every_n_epochs: Epochs from one removal to the next; 0 for none.
        round_to: Widths are kept at multiples of this.
        state: What :meth:`RemovalSchedule.state_dict` of an earlier training returned.
    """
    if not every_n_epochs:
        return None
    if shards_parameters(trainer.strategy):
        warn(
            f"SelfCompression: {type(trainer.strategy).__name__} shards parameters, so no channels are removed; bit "
            f"depths are learned all the same. To remove channels, train with one device or DDP; "
            f"prune_every_n_epochs=0 hides this."
        )
        return None
    return RemovalSchedule(module, every_n_epochs=every_n_epochs, round_to=round_to, state=state)
