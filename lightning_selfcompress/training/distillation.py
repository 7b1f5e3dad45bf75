"""Distillation while a network compresses itself: a teacher's pull on the outputs of each training step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_selfcompress.removal.trial import random_states_kept
from lightning_selfcompress.tensors import is_a, map_tensors, tensors_in
from lightning_selfcompress.training.depth_training import loss_scale
from lightning_selfcompress.training.intercept import intercept
from lightning_selfcompress.training.messages import warn
from lightning_selfcompress.training.sandbox import sandboxed_class
from lightning_selfcompress.training.stand_in import StandIn
from lightning_selfcompress.training.teacher import Kind, Teacher, pull_towards

_LOSSES: Mapping[Any, Kind] = {
    functional.cross_entropy: "classes",
    functional.nll_loss: "classes",
    functional.binary_cross_entropy_with_logits: "binary",
    functional.mse_loss: "values",
    functional.l1_loss: "values",
    functional.smooth_l1_loss: "values",
    functional.huber_loss: "values",
}


@dataclass(frozen=True, eq=False)
class Output:
    """An output of a step that is compared: the tensor, and how the step's own loss counts its entries.

    Args:
        tensor: The tensor.
        kind: What it holds.
        dim: The dimension of the classes.
        counts: Which samples count, of the tensor's shape without ``dim``; None for all of them.
        summed: Whether the loss is a sum over samples, not their mean.
    """

    tensor: Tensor
    kind: Kind
    dim: int = -1
    counts: Tensor | None = None
    summed: bool = False

    def pull(self, teacher: Tensor, temperature: float) -> Tensor:
        """Returns the gradient of the distance from a teacher's output, as the step's own loss counts samples."""
        pull = pull_towards(self.tensor, teacher, kind=self.kind, temperature=temperature, dim=self.dim)
        samples = pull.numel() // (pull.shape[self.dim] if self.kind == "classes" and pull.dim() else 1)
        if self.counts is not None:
            pull = pull * self.counts.unsqueeze(self.dim)
            samples = int(self.counts.sum())
        return pull if self.summed else pull / max(samples, 1)


class Losses(TorchFunctionMode):
    """Sees what is given to loss functions of torch while it is entered; each tensor once.

    Args:
        see: Called with each output right before its loss is computed.
    """

    def __init__(self, see: Callable[[Output], None]) -> None:
        super().__init__()
        self._see = see
        self._seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _LOSSES:
            given = signature(function).bind(*args, **kwargs)
            given.apply_defaults()
            tensor = given.arguments["input"]
            if all(tensor is not known for known in self._seen):
                self._seen.append(tensor)
                self._see(_output(_LOSSES[function], given.arguments))
        return function(*args, **kwargs)


def _output(kind: Kind, given: Mapping[str, Any]) -> Output:
    """Returns what is compared, from the arguments of a loss function."""
    tensor, target, summed = given["input"], given["target"], given["reduction"] == "sum"
    if kind != "classes":
        return Output(tensor, kind, summed=summed)
    counts = None if target.is_floating_point() else target != given["ignore_index"]
    return Output(tensor, kind, min(1, tensor.dim() - 1), counts=counts, summed=summed)


class Distillation:
    """Pulls the outputs of every training step towards a teacher's.

    The pull is the gradient of ``weight`` times the distance, and it is added to the gradient that the step's own loss
    sends into the outputs, under loss scaling and accumulation too: no loss changes, whoever computes it.

    Args:
        trainer: The Trainer.
        module: The converted LightningModule, before its first step.
        teacher: The teacher.
        state: What :meth:`state_dict` returned in a training that goes on.

    Raises:
        CheckpointError: If the teacher's checkpoint does not fit.
        ValueError: If the module has no module of the name given for the outputs.
    """

    def __init__(self, trainer: Any, module: nn.Module, teacher: Teacher, state: Mapping[str, Any] | None) -> None:
        self._trainer, self._teacher = trainer, teacher
        self._state = state if state is not None else teacher.state(module)
        network = trainer.precision_plugin.convert_module(teacher.made(module, self._state))
        self._network = network.to(next(module.parameters()).device)
        self._restore: Callable[[], None] = lambda: None
        self._told = False
        if is_a(self._network, "LightningModule"):
            self._network.__class__ = sandboxed_class(type(self._network))
            self._network.__dict__["_logged"] = []
        if teacher.outputs is not None and teacher.outputs not in dict(module.named_modules()):
            raise ValueError(
                f"Expected a module {teacher.outputs!r} in {type(module).__name__}, whose output is compared with the "
                f"teacher's; there is none. Its modules: {', '.join(n for n, _ in module.named_children())}."
            )

    def state_dict(self) -> Mapping[str, Any] | None:
        """The float network that teaches, where it is the module's own; None for one that was given."""
        return self._state

    def arm(self, module: nn.Module) -> None:
        """Has the next training step taught."""
        self.close()

        def around(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                return self._taught(module, method, args, kwargs)
            finally:
                self.arm(module)  # an optimizer may run its closure several times

        self._restore = intercept(module, "training_step", around)

    def close(self) -> None:
        """Leaves the module's training step as it is."""
        self._restore()
        self._restore = lambda: None

    def _taught(self, module: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scale = self._teacher.weight * loss_scale(self._trainer)
        scale /= self._trainer.accumulate_grad_batches if module.automatic_optimization else 1
        if self._teacher.outputs is not None:
            with self._beside(module.get_submodule(self._teacher.outputs), scale):
                return method(*args, **kwargs)
        targets = self._run(args, kwargs)
        left = iter(targets)

        def teach(output: Output) -> None:
            self._pull(output, next(left, None), scale)

        with Losses(teach):
            returned = method(*args, **kwargs)
        if not targets:
            self._tell("none", "none")
        return returned

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Runs a training step of the teacher, and returns what it gives to its losses."""
        network: Any = self._network
        values = {name: getattr(self._trainer, name) for name in ("global_step", "current_epoch")}
        network.trainer = StandIn(self._trainer, network, {}, values)
        args, kwargs = map_tensors(torch.Tensor.clone, (args, dict(kwargs)))
        found: list[Tensor] = []
        with torch.no_grad(), random_states_kept(), Losses(lambda output: found.append(output.tensor)):
            network.training_step(*args, **kwargs)
        network._logged.clear()
        return found

    @contextmanager
    def _beside(self, part: nn.Module, scale: float) -> Iterator[None]:
        """Runs the teacher beside a module, whenever that is called."""
        assert self._teacher.outputs is not None
        lightning = is_a(self._network, "LightningModule")
        network = self._network.get_submodule(self._teacher.outputs) if lightning else self._network

        def teach(_: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
            with torch.no_grad(), random_states_kept():
                targets = _floats(network(*args, **kwargs))
            for mine in _floats(returned)[:1]:
                output = Output(mine, "classes", 1 if mine.dim() > 3 else -1)
                self._pull(output, targets[0] if targets else None, scale)

        handle = part.register_forward_hook(teach, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _pull(self, output: Output, target: Tensor | None, scale: float) -> None:
        if target is None or target.shape != output.tensor.shape:
            self._tell(str(tuple(output.tensor.shape)), "none" if target is None else str(tuple(target.shape)))
        elif output.tensor.requires_grad:
            pull = (output.pull(target, self._teacher.temperature) * scale).to(output.tensor.dtype)
            output.tensor.register_hook(lambda gradient: gradient + pull)

    def _tell(self, mine: str, target: str) -> None:
        if not self._told:
            self._told = True
            warn(
                f"SelfCompression: the teacher teaches nothing in this step. Expected outputs of one shape, got {mine} "
                f"in the network and {target} in the teacher. Teacher(..., outputs=...) names the module whose output "
                f"is compared."
            )


def start_distillation(
    trainer: Any, module: nn.Module, teacher: Teacher | None, state: Mapping[str, Any] | None
) -> Distillation | None:
    """Returns the distillation of a training; None without a teacher."""
    return None if teacher is None else Distillation(trainer, module, teacher, state)


def _floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
