"""A budget of bytes while a Trainer runs: gamma follows a falling set point, and the end is exact."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.budget.controller import Controller
from lightning_selfcompress.budget.forecast import forecast
from lightning_selfcompress.budget.landing import curvatures, file_nbytes, land
from lightning_selfcompress.budget.set_point import fallen, set_point
from lightning_selfcompress.budget.smallest import smallest_nbytes
from lightning_selfcompress.budget.target import target_nbytes
from lightning_selfcompress.budget.vectors import round_vectors, vectors_of
from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.size.report import float_nbytes_of
from lightning_selfcompress.training.depth_training import progress
from lightning_selfcompress.training.lightning_private import batches_that_stepped
from lightning_selfcompress.training.messages import tell
from lightning_selfcompress.training.normalization import Normalization
from lightning_selfcompress.training.strategies import replicates

_STEPS = 5  # from one update of gamma to the next
_LEAST_EPOCHS, _LEAST_STEPS = 3, 100
_LANDINGS = 4
_ABOVE = 1.02  # the set point ends this far above the target, so that the landing takes off what is cheapest


class Budget:
    """Steers gamma so that a training ends at or just under a number of bytes.

    Args:
        trainer: The Trainer.
        module: The converted module.
        target_size: What the user asks for, see :func:`target_nbytes`.
        state: What :meth:`state_dict` of an earlier training returned, to go on from there.

    Attributes:
        target: The largest packed file that is allowed, in bytes.
        landed: Whether the module is within the target, as far as it can be.

    Raises:
        ValueError: If the size cannot be read, or the training has no end or is too short.
    """

    def __init__(self, trainer: Any, module: nn.Module, target_size: int | float | str, state: Any = None) -> None:
        self.target = target_nbytes(target_size, float_nbytes_of(module))
        self.landed = False
        _check_length(trainer)
        self._controller = Controller()
        self._start = 0  # bytes at the beginning of the training
        self._step = 0  # of the last update
        self._correction = 1.0  # what the last exact size was of its estimate
        if state is not None:
            self._start, self._step, self._correction = state["start"], state["step"], state["correction"]
            self._controller = Controller(**state["controller"])

    @property
    def gamma(self) -> float:
        """The weight of the price in the loss."""
        return self._controller.gamma

    @property
    def begun(self) -> bool:
        """Whether the size at the beginning is known."""
        return self._start > 0

    def state_dict(self) -> dict[str, Any]:
        """What the budget needs to go on."""
        controller = vars(self._controller).copy()
        return {"start": self._start, "step": self._step, "correction": self._correction, "controller": controller}

    def begin(self, module: nn.Module, channels: Channels | None, round_to: int) -> None:
        """Says what is possible, before the first step.

        Raises:
            ValueError: If the target is below the smallest size that the module can have.
        """
        smallest, largest = smallest_nbytes(module, channels, round_to=round_to), file_nbytes(module)
        floats = float_nbytes_of(module)
        if self.target < smallest:
            raise ValueError(
                f"Expected a target_size of at least {smallest:,} bytes, got {self.target:,}: that is the packed "
                f"file of this network with all channels gone that can go. Ask for more, or take a smaller network."
            )
        tell(
            f"SelfCompression: a target of {self.target:,} bytes, {self.target / floats:.2%} of the float network's "
            f"{floats:,}. This network can have {smallest:,} to {largest:,} bytes."
        )
        self._start = forecast(module, None).nbytes

    def update(self, trainer: Any, module: nn.Module, channels: Channels | None, batch_idx: int) -> None:
        """Moves gamma after a step, if it is time."""
        steps = batches_that_stepped(trainer)
        if not self.begun or steps % _STEPS or steps == self._step:
            return
        passed, self._step = steps - self._step, steps
        done = progress(trainer, batch_idx + 1)
        now = trainer.strategy.broadcast(forecast(module, channels).nbytes * self._correction)
        target = min(self.target * _ABOVE, self._start)
        wanted = set_point(done, self._start, target, fallen(steps / done, self._start, target))
        self._controller.update(passed, math.log(now / wanted))

    def correct(self, module: nn.Module, nbytes: int) -> None:
        """Takes up the exact size of a module, which the estimate is measured by."""
        self._correction = nbytes / forecast(module, None, narrow=False).nbytes

    def land(self, trainer: Any, module: nn.Module, normalization: Normalization | None) -> None:
        """Rounds vectors and moves codes until the packed file is within the target, and says so.

        Args:
            trainer: The Trainer.
            module: The module in training.
            normalization: What estimates statistics of normalization anew, for the codes as they are.
        """
        before, moved, wanted, self.landed = file_nbytes(module), 0, self.target, True
        _agree(trainer.strategy, module)
        vectors = [(tensor, tensor.detach().clone()) for tensor in vectors_of(module)]
        for _ in range(_LANDINGS):
            round_vectors(module)
            landing = land(module, wanted, curvatures(module, trainer.optimizers))
            moved += landing.moved
            _put_back(vectors)
            if normalization is not None:
                normalization.refresh(trainer, module, again=True)
            _agree(trainer.strategy, module)
            round_vectors(module)
            after = file_nbytes(module)
            if after <= self.target or landing.after > wanted:
                break
            wanted -= after - self.target  # the statistics of other codes may take another byte
            _put_back(vectors)
        over = "" if after <= self.target else " The target was not reached, since no code is left to be moved."
        tell(
            f"SelfCompression: {before:,} bytes -> {after:,} bytes, with a target of {self.target:,}: vectors rounded "
            f"to a byte a value, {moved:,} of {landing.weights:,} codes moved.{over}"
        )


def start_budget(trainer: Any, module: nn.Module, target_size: int | float | str | None, state: Any) -> Budget | None:
    """Returns the budget of a training; None where no size is asked for."""
    return None if target_size is None else Budget(trainer, module, target_size, state)


@torch.no_grad()
def _agree(strategy: Any, module: nn.Module) -> None:
    """Has all processes end with the vectors of the first one: each has estimated statistics on batches of its own."""
    if replicates(strategy):
        tensors = vectors_of(module)
        for tensor, values in zip(tensors, strategy.broadcast([t.detach().cpu() for t in tensors]), strict=True):
            tensor.copy_(values)


@torch.no_grad()
def _put_back(vectors: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in vectors:
        tensor.copy_(before)


def is_last_batch(trainer: Any, batch_idx: int) -> bool:
    """Returns whether no batch follows in a training."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return bool(last and trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1)


def _check_length(trainer: Any) -> None:
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
    steps = trainer.max_steps if trainer.max_steps > 0 else math.inf
    expected = f"Expected a Trainer of at least {_LEAST_EPOCHS} epochs or {_LEAST_STEPS} steps for target_size"
    if math.isinf(epochs) and math.isinf(steps):
        raise ValueError(f"{expected}, got one without max_epochs and max_steps. The size has to land at a known end.")
    if epochs < _LEAST_EPOCHS or steps < _LEAST_STEPS:
        raise ValueError(f"{expected}, got max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}.")
