"""A trial: the steps of a network before and after a removal on copies, compared output by output."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_selfcompress.channels.dispatch import uncompiled
from lightning_selfcompress.removal.plan import RemovalPlan
from lightning_selfcompress.removal.surgery import Edit, kept_entries, remove, shrink
from lightning_selfcompress.tensors import copy_module, stored_tensors, tensors_in


@dataclass(frozen=True)
class Replay:
    """A step that is run again on copies of a network.

    Args:
        run: A function that runs the step on a given copy, with floating point inputs of the given dtype, and returns
            the outputs of the step.
        evaluates: Whether this is a step of evaluation. Any other step is run as the network is, mostly in training
            mode, and once more in evaluation mode if it can be run in it.
        few: The same with a few examples of its batch, which is taken if the network runs with so few.
    """

    run: Callable[[nn.Module, torch.dtype], Any]
    evaluates: bool = False
    few: Callable[[nn.Module, torch.dtype], Any] | None = None


class Role(Enum):
    """The origin of an output of a step."""

    HIDDEN = "of a child of the network, which may lose channels"
    FINAL = "of the network itself"
    RETURNED = "returned by the step: a loss, mostly"


@dataclass(frozen=True, eq=False)
class _Output:
    role: Role
    value: Tensor
    has_gradient: bool = False


class Trial:
    """The outputs of the steps of a network, with which the outputs after a removal are compared.

    Args:
        model: A converted module; it is not changed.
        steps: The steps to replay.

    Raises:
        Exception: Whatever a step raises on a copy of the unchanged network.
        ValueError: If there is no step, or no output of a step is finite.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Replay]) -> None:
        self._runs = [_Run(model, step, evaluates=step.evaluates) for step in steps]
        if not self._runs:
            raise ValueError("no step is at hand to try it with")
        for step in steps:
            if not step.evaluates:
                try:
                    self._runs.append(_Run(model, step, evaluates=True))
                except Exception:  # a step that runs in training mode alone proves the plan for that mode
                    continue

    def holds(self, plan: RemovalPlan) -> bool:
        """Returns whether all outputs are the same after a plan was carried out on copies."""
        try:
            return all(run.holds(plan.edits) for run in self._runs)
        except Exception:  # a size written into the code may raise any exception, and so may a backward pass
            return False


class _Run:
    """One step of a network in one mode.

    The network runs in float64 on the CPU if it can, otherwise in float32. Accelerators compute in float64 slowly or
    not at all. There, a removal is proved in float32: a dead channel adds exact zeros, so a right removal changes only
    the order of sums, by some 1e-6 of the largest output; a number in the code that stands for the width moves outputs
    by about the share of the channels removed.
    """

    def __init__(self, model: nn.Module, step: Replay, *, evaluates: bool) -> None:
        self._model, self._evaluates = model, evaluates
        self._keeps_graph = not step.evaluates  # a batch of validation is often larger than memory for its graph
        self._gradients: dict[str, Tensor] | None = None
        self._repeats: list[bool] | None = None
        on_cpu = all(t.device.type == "cpu" for t in stored_tensors(model).values())
        ways = [(run, double) for run in (step.few, step.run) if run is not None for double in (on_cpu, False)]
        ways = list(dict.fromkeys(ways))
        for way in ways:
            self._step, double = way
            self._dtype, self._tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-4)
            try:
                self._outputs = self._run(())
            except Exception:  # the code of some networks names a dtype, or the size of its batches
                if way == ways[-1]:
                    raise
                continue
            if not self._outputs or any(bool(output.value.isfinite().any()) for output in self._outputs):
                return
        raise ValueError("no output of the step is finite")

    def holds(self, edits: Sequence[Edit]) -> bool:
        """Returns whether the outputs are the same after a removal.

        A loss may change by a penalty on the removed weights. If only losses differ, and numbers that are equal to one,
        the removal holds if the gradients of all remaining entries are the same. Numbers that differ without a removal
        as well, such as a duration, are not compared.
        """
        outputs = self._run(edits)
        if len(outputs) != len(self._outputs):
            return False
        same = [self._same(one, now.value) for one, now in zip(self._outputs, outputs, strict=True)]
        if all(same):
            return True
        if self._repeats is None:
            again = self._run(())
            self._repeats = [self._same(a, b.value) for a, b in zip(self._outputs, again, strict=True)]
        other = [
            o for o, equal, repeats in zip(self._outputs, same, self._repeats, strict=True) if repeats and not equal
        ]
        if not other:
            return True
        known = self._outputs if self._keeps_graph else self._run((), graph=True)
        losses = [one.value for one in known if one.has_gradient and one.value.numel() == 1]
        are_losses = all(one.role is Role.RETURNED and _is_among(one.value, losses) for one in other)
        return are_losses and self._trains_alike(edits)

    def _copy(self, edits: Sequence[Edit]) -> nn.Module:
        copied = copy_module(self._model).to(self._dtype)
        remove(copied, edits)
        return copied.eval() if self._evaluates else copied

    def _run(self, edits: Sequence[Edit], *, graph: bool = False) -> list[_Output]:
        """Returns the outputs of the step, of the network, and of the direct children of the network.

        Args:
            edits: The removal to carry out before.
            graph: Whether gradients are recorded in a step of validation too, to know its losses.
        """
        net = self._copy(edits)
        seen: list[_Output] = []

        def record(role: Role) -> Callable[..., None]:
            return lambda _module, _args, out: seen.extend(_Output(role, t.detach().clone()) for t in _numbers(out))

        for child in net.children():
            child.register_forward_hook(record(Role.HIDDEN))
        net.register_forward_hook(record(Role.FINAL))
        with uncompiled(), _repeatable(), torch.set_grad_enabled(self._keeps_graph or graph):
            returned = _numbers(self._step(net, self._dtype))
            seen.extend(_Output(Role.RETURNED, t.detach(), t.requires_grad) for t in returned)
        return seen

    def _same(self, one: _Output, other: Tensor) -> bool:
        if one.value.shape != other.shape:
            return one.role is Role.HIDDEN  # the child may have lost channels
        return self._close(one.value, other)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        known = one.isfinite()  # values that are not finite are not compared
        one, other = one[known], other[known]
        scale = float(one.abs().max()) if one.numel() else 0.0
        return torch.allclose(one, other, rtol=self._tolerance, atol=self._tolerance * scale)

    def _trains_alike(self, edits: Sequence[Edit]) -> bool:
        """Returns whether the remaining entries have the same gradients of the loss as before the removal."""
        if self._gradients is None:
            self._gradients = self._gradients_of(())
        now, kept = self._gradients_of(edits), kept_entries(edits)
        if not now or self._gradients.keys() != now.keys():
            return False
        return all(self._close(shrink(g, kept.get(name, {})), now[name]) for name, g in self._gradients.items())

    def _gradients_of(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        """Returns the gradients of the losses that the step returns, by name; none without a loss."""
        net = self._copy(edits)
        with uncompiled(), _repeatable(), torch.enable_grad():
            losses = [t for t in _numbers(self._step(net, self._dtype)) if t.numel() == 1 and t.requires_grad]
            learning = {name: t for name, t in stored_tensors(net).items() if t.requires_grad}
            gradients = _gradients(losses, [*learning.values()])
        pairs = zip(learning, gradients, strict=False)
        return {name: gradient for name, gradient in pairs if gradient is not None}


def _is_among(number: Tensor, losses: Sequence[Tensor]) -> bool:
    """Returns whether a number is one of some losses, or the same as one, logged without its graph."""
    return number.numel() == 1 and any(abs(float(number) - float(loss)) <= 1e-5 * abs(float(loss)) for loss in losses)


def _gradients(losses: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not losses or not tensors:
        return ()
    return torch.autograd.grad(torch.stack([loss.reshape(()) for loss in losses]).sum(), tensors, allow_unused=True)


def _numbers(value: Any) -> Iterator[Tensor]:
    return (t for t in tensors_in(value) if t.is_floating_point())


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the states of the random generators of Python, NumPy and torch after this context."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _repeatable() -> Iterator[None]:
    """Makes random numbers the same in every run and for all shapes."""
    with random_states_kept(), _Constant():  # type: ignore[no-untyped-call]
        torch.default_generator.manual_seed(0)  # torch.manual_seed raises while another thread exports
        random.seed(0)
        np.random.seed(0)
        yield


class _Constant(TorchDispatchMode):
    """Replaces random numbers by constants and turns dropout off, so that a smaller network sees the same numbers."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator) or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [a.name for a in func._schema.arguments]
        if "dropout_p" in names and names.index("dropout_p") < len(args):
            place = names.index("dropout_p")
            args = (*args[:place], 0.0, *args[place + 1 :])
        if func._schema.name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        state = torch.get_rng_state()
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.numel() > 1:
            torch.set_rng_state(state)  # the draws of single numbers, which may decide something, go on alike
            if out.is_floating_point():
                out.fill_(1.0 if "bernoulli" in func._schema.name else 0.5)
        return out
