"""The dry run, in which a removal is carried out on copies and compared before it touches the network.

Sizes that became Python numbers (``view(n, 2, 4)``, ``x.shape[1] ** -0.5``) are seen by no operation. Here they show.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.dispatch import uncompiled
from lightning_selfcompress.removal.plan import RemovalPlan, narrow
from lightning_selfcompress.removal.surgery import Edit, remove, shrink
from lightning_selfcompress.tensors import copy_module, stored_tensors, tensors_in

Replay = Callable[[nn.Module, torch.dtype], Any]


_REASON = "its removal changed the outputs in a dry run (a size may be written into the code)"


def prove(model: nn.Module, channels: Channels, plan: RemovalPlan, replay: Replay) -> tuple[RemovalPlan, Channels]:
    """Tries a removal on a copy: the outputs have to stay the same in training and in evaluation mode.

    Where they differ, the plan is halved until what is wrong is found; that is pinned, with all other channels of the
    same layers. Random state and the model are as before; random numbers are constants meanwhile.

    Args:
        model: The module, not changed.
        channels: Its channels.
        plan: A plan for it.
        replay: Runs a training step, or a forward, on a copy that it is given, with floating point inputs of the
            given dtype; returns its outputs.

    Returns:
        The part of the plan that was proved, and the channels with what was refuted pinned.
    """
    if not plan:
        return plan, channels
    try:
        trial = _Trial(model, replay)
    except Exception as error:  # whatever somebody's network raises on a copy
        reason = f"the dry run failed before anything was removed: {type(error).__name__}: {error}"
        return narrow(model, channels, plan, (), reason), channels
    right: list[int] = []
    wrong: list[int] = []

    def search(units: Sequence[tuple[int, ...]]) -> None:
        added = [number for unit in units for number in unit]
        if not units or trial.holds(narrow(model, channels, plan, [*right, *added], "")):
            right.extend(added)
        elif len(units) == 1:
            wrong.extend(added)
        else:
            half = len(units) // 2
            search(units[:half])
            search(units[half:])

    units = _units(channels, plan)
    search(list(units.values()))
    if not wrong:
        return plan, channels
    refuted = {key for key, unit in units.items() if not set(unit).isdisjoint(wrong)}
    alike = [n for n, key in _signatures(channels).items() if key in refuted]
    return narrow(model, channels, plan, right, _REASON), channels.pin(alike, _REASON)


def _signatures(channels: Channels) -> dict[int, tuple[str, ...]]:
    """The names of the depths that produce each channel: channels of the same layers are right or wrong together."""
    found: dict[int, list[str]] = {}
    for slot in channels.slots:
        if slot.produces:
            for number in np.unique(channels.group[slot.atoms]).tolist():
                found.setdefault(number, []).append(slot.name)
    return {number: tuple(names) for number, names in found.items()}


def _units(channels: Channels, plan: RemovalPlan) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The channels of a plan, put together by their layers."""
    signatures = _signatures(channels)
    units: dict[tuple[str, ...], list[int]] = {}
    for number in plan.channels:
        units.setdefault(signatures[number], []).append(number)
    return {key: tuple(numbers) for key, numbers in units.items()}


class ProvesNothingError(ValueError):
    """A step whose outputs tell nothing about the network."""


class Role(Enum):
    """What an output of a step is to whoever runs it."""

    HIDDEN = "of a child of the network, which may lose channels"
    FINAL = "of the network itself"
    RETURNED = "returned by the step: a loss, mostly"


@dataclass(frozen=True, eq=False)
class _Output:
    role: Role
    value: Tensor


class _Trial:
    """The outputs of a network, and whether a plan keeps them; in float64 if the network runs in it."""

    def __init__(self, model: nn.Module, replay: Replay) -> None:
        self._model, self._replay = model, replay
        self._gradients: list[dict[str, Tensor]] | None = None
        self._evaluates = False
        try:
            self._dtype, self._tolerance = torch.float64, 1e-10
            self._outputs = self._run(())
        except Exception:  # some networks name their dtype
            self._dtype, self._tolerance = torch.float32, 1e-4
            self._outputs = self._run(())
        if not any(bool(output.value.isfinite().any()) for output in self._outputs):
            raise ProvesNothingError("no output of the step is finite")
        try:
            self._outputs += self._outputs_of(copy_module(model).to(self._dtype).eval())
            self._evaluates = True
        except Exception:  # a training step may be written for training mode alone, which then is what it proves
            return

    def holds(self, plan: RemovalPlan) -> bool:
        """Whether the outputs are the same after a plan was carried out on a copy.

        A loss may be another one by a penalty on the weights that are gone: it holds if the gradients of all that is
        left are the same.
        """
        try:
            outputs = self._run(plan.edits)
        except Exception:  # a size written into the code shows in many ways
            return False
        if len(outputs) != len(self._outputs):
            return False
        other = [one for one, now in zip(self._outputs, outputs, strict=True) if not self._same(one, now.value)]
        losses = all(one.role is Role.RETURNED and one.value.numel() == 1 for one in other)
        return not other or (losses and self._trains_alike(plan.edits))

    def _copies(self, edits: Sequence[Edit]) -> Iterator[nn.Module]:
        """The network after a removal, in training mode and, if the step runs in it, in evaluation mode."""
        trained = copy_module(self._model).to(self._dtype)
        remove(trained, edits)
        evaluated = copy_module(trained).eval() if self._evaluates else None
        yield trained
        if evaluated is not None:
            yield evaluated

    def _run(self, edits: Sequence[Edit]) -> list[_Output]:
        return [output for net in self._copies(edits) for output in self._outputs_of(net)]

    def _outputs_of(self, net: nn.Module) -> list[_Output]:
        """The outputs of the step, and the outputs of the network and of its direct children on the way."""
        seen: list[_Output] = []

        def record(role: Role) -> Callable[..., None]:
            return lambda _module, _args, out: seen.extend(_Output(role, t.detach().clone()) for t in _floats(out))

        for child in net.children():
            child.register_forward_hook(record(Role.HIDDEN))
        net.register_forward_hook(record(Role.FINAL))
        with uncompiled(), _repeatable(), torch.enable_grad():
            seen.extend(_Output(Role.RETURNED, t.detach()) for t in _floats(self._replay(net, self._dtype)))
        return seen

    def _same(self, one: _Output, other: Tensor) -> bool:
        if one.value.shape != other.shape:
            return one.role is Role.HIDDEN  # a layer that lost channels
        return self._close(one.value, other)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        known = one.isfinite()  # what is not finite proves nothing, and refutes nothing
        one, other = one[known], other[known]
        scale = float(one.abs().max()) if one.numel() else 0.0
        return torch.allclose(one, other, rtol=self._tolerance, atol=self._tolerance * scale)

    def _trains_alike(self, edits: Sequence[Edit]) -> bool:
        """Whether what a removal leaves gets the gradients of the loss that it had before."""
        if self._gradients is None:
            self._gradients = self._gradients_of(())
        kept: dict[str, dict[int, Tensor]] = {}
        for edit in (e for e in edits if not e.attribute):
            kept.setdefault(edit.name, {})[edit.dim] = edit.kept
        for before, now in zip(self._gradients, self._gradients_of(edits), strict=True):
            if not now or before.keys() != now.keys():
                return False
            if not all(self._close(shrink(g, kept.get(name, {})), now[name]) for name, g in before.items()):
                return False
        return True

    def _gradients_of(self, edits: Sequence[Edit]) -> list[dict[str, Tensor]]:
        """For each copy the gradients of the losses that its step returns, by name; none if it returns no loss."""
        found = []
        for net in self._copies(edits):
            with uncompiled(), _repeatable(), torch.enable_grad():
                losses = [t for t in _floats(self._replay(net, self._dtype)) if t.numel() == 1 and t.requires_grad]
                learning = {name: t for name, t in stored_tensors(net).items() if t.requires_grad}
                gradients = _gradients(losses, [*learning.values()])
            pairs = zip(learning, gradients, strict=False)
            found.append({name: gradient for name, gradient in pairs if gradient is not None})
        return found


def _gradients(losses: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not losses or not tensors:
        return ()
    return torch.autograd.grad(torch.stack([loss.reshape(()) for loss in losses]).sum(), tensors, allow_unused=True)


def _floats(value: Any) -> Iterator[Tensor]:
    return (t for t in tensors_in(value) if t.is_floating_point())


@contextmanager
def _repeatable() -> Iterator[None]:
    """A context of equal random numbers at every run and for all shapes; generators get their states back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), _Constant():  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Constant(TorchDispatchMode):
    """Turns random numbers into constants and dropout off, so that a smaller network sees the same numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [a.name for a in func._schema.arguments]
        if "dropout_p" in names and names.index("dropout_p") < len(args):
            place = names.index("dropout_p")
            args = (*args[:place], 0.0, *args[place + 1 :])
        if func._schema.name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point():
            out.fill_(1.0 if "bernoulli" in func._schema.name else 0.5)
        return out
