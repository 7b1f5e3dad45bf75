"""A teacher: a float network whose outputs the network in training is drawn to."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.quantize.convert import revert
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.tensors import copy_module, is_a, stored_tensors


@dataclass(frozen=True)
class Teacher:
    """A float network whose outputs the network in training is drawn to, beside its own loss (distillation).

    The outputs compared are found: they are what the training step gives to ``cross_entropy``, ``nll_loss``,
    ``binary_cross_entropy_with_logits``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss`` and ``huber_loss``, in the same
    order in both networks. Where a step computes its loss otherwise, ``outputs`` names the
    module that returns them. The teacher runs each batch without gradients, in eval mode.

    >>> from lightning_selfcompress import SelfCompression, Teacher
    >>> from lightning_selfcompress.demo import DigitsNet
    >>> callback = SelfCompression(gamma=0.1, teacher=Teacher(DigitsNet(), temperature=4.0))

    Args:
        network: ``"start"``, the network as it is when training begins, for one that was trained before; the path of a
            checkpoint of the float network; or a network. A LightningModule runs its ``training_step``; any other
            network needs ``outputs``, and gets the inputs of the module named there.
        outputs: Name of the module whose output is compared, ``""`` for the LightningModule's own ``forward``. A
            tensor of four or more dimensions has its classes in dimension 1, any other in its last one.
        temperature: Divides logits of both networks before they are compared, > 0: more of it tells more of the
            classes that are unlikely.
        weight: What the distance counts beside the loss, > 0.

    Raises:
        TypeError: If the network is none, or a number is none.
        ValueError: If a number is out of its range, or a network without ``training_step`` comes without ``outputs``.
    """

    network: nn.Module | str | PathLike[str] = "start"
    outputs: str | None = None
    temperature: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module | str | PathLike):
            raise TypeError(
                f'Expected teacher="start", the path of a checkpoint, a network or a Teacher, got {self.network!r}.'
            )
        for name in ("temperature", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"Expected a finite {name} > 0 of a teacher, got {value!r}.")
        if isinstance(self.network, nn.Module) and not is_a(self.network, "LightningModule") and self.outputs is None:
            raise ValueError(
                f"Expected Teacher(network, outputs=...) for a {type(self.network).__name__}, which has no "
                f"training_step: the name of the module whose inputs it takes and whose output it teaches."
            )

    @classmethod
    def of(cls, teacher: "Teacher | nn.Module | str | PathLike[str] | None") -> "Teacher | None":
        """Returns a teacher from what is given for one."""
        return teacher if teacher is None or isinstance(teacher, Teacher) else cls(teacher)

    def state(self, module: nn.Module) -> dict[str, Tensor] | None:
        """Returns the state dict that a copy of a module takes to become the teacher; None for a network given.

        Args:
            module: The converted module, before its first step.

        Raises:
            CheckpointError: If the checkpoint is of another network, or a compressed one.
        """
        if isinstance(self.network, nn.Module):
            return None
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        if self.network == "start":
            return state
        saved = torch.load(self.network, map_location="cpu", weights_only=False)
        saved = saved["state_dict"] if isinstance(saved, Mapping) and "state_dict" in saved else saved
        learned = learned_tensors(module)
        wanted = {n for n, t in stored_tensors(module, transient=False).items() if id(t) not in learned}
        _check(Path(self.network), saved, {name: state[name] for name in wanted if name in state})
        return state | {name: saved[name] for name in saved if name in state}

    def made(self, module: nn.Module, state: Mapping[str, Tensor] | None) -> nn.Module:
        """Returns the teacher: a float network in eval mode, whose parameters ask for no gradient.

        Args:
            module: The converted module in training, which may have shrunk since.
            state: What :meth:`state` returned before its first step.

        Raises:
            ValueError: If the teacher is the module itself, which would follow itself.
        """
        if self.network is module:
            raise ValueError('Expected a network of its own as a teacher, got the module itself. Take teacher="start".')
        network = copy_module(self.network if isinstance(self.network, nn.Module) else module)
        if state is not None:
            network.load_state_dict(dict(state), strict=False)  # layers found in the first step have depths by now
            revert(network)
        return network.eval().requires_grad_(False)


Taught = Teacher | nn.Module | str | PathLike[str] | None
Kind = Literal["classes", "binary", "values"]


def _check(path: Path, saved: Any, wanted: Mapping[str, Tensor]) -> None:
    """Checks that a checkpoint holds the float network of a module."""
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(f"Expected a checkpoint of the float network for a teacher in {str(path)!r}.")
    absent = [name for name in wanted if name not in saved]
    if absent:
        raise CheckpointError(
            f"Expected a checkpoint of the float network for a teacher in {str(path)!r}, which lacks "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''} ({len(absent)} tensors)."
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"Expected {name!r} of the teacher in {str(path)!r} to have the shape {tuple(tensor.shape)}, got "
                f"{tuple(saved[name].shape)}. A smaller one, opened with load_from_checkpoint, can be given as network."
            )


def pull_towards(student: Tensor, teacher: Tensor, *, kind: Kind, temperature: float, dim: int = -1) -> Tensor:
    r"""Gradient, with respect to a network's outputs, of their distance from a teacher's, one sample each.

    For logits it is that of :math:`T^2 \, \mathrm{KL}(p_t \,\|\, p_s)`, where :math:`p = \mathrm{softmax}(z / T)`
    (a sigmoid for binary ones), which is :math:`T (p_s - p_t)`; for values that of half the squared difference.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    >>> pull_towards(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 100.0]), kind="classes", temperature=1.0)
    tensor([ 0.5000, -0.5000])

    Args:
        student: Outputs of the network in training, of any shape and floating point dtype.
        teacher: Outputs of the teacher, of the same shape.
        kind: ``"classes"`` for logits, or logarithms of probabilities, that exclude one another along ``dim``,
            ``"binary"`` for logits of yes and no, ``"values"`` for all else.
        temperature: What logits are divided by.
        dim: The dimension of the classes.

    Returns:
        The gradient, in float32 or the student's wider dtype.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.detach().to(wide), teacher.detach().to(wide)
    if kind == "values":
        return student - teacher
    student, teacher = student / temperature, teacher / temperature
    if kind == "binary":
        return temperature * (student.sigmoid() - teacher.sigmoid())
    return temperature * (student.softmax(dim) - teacher.softmax(dim))
