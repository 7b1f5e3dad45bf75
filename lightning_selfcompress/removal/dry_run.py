"""The dry run, which carries out a removal on copies and compares their outputs before the network is changed.

Sizes that became Python numbers (``view(n, 2, 4)``, ``x.shape[1] ** -0.5``) do not show in the watched operations. The
dry run detects them.
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
from lightning_selfcompress.removal.surgery import Edit, kept_entries, remove, shrink
from lightning_selfcompress.tensors import copy_module, stored_tensors, tensors_in

Replay = Callable[[nn.Module, torch.dtype], Any]


_REASON = "its removal changed the outputs in a dry run (a size may be written into the code)"


def prove(model: nn.Module, channels: Channels, plan: RemovalPlan, replay: Replay) -> tuple[RemovalPlan, Channels]:
    """Tries a removal on copies, whose outputs have to stay the same in training and in evaluation mode.

    If the outputs differ, the plan is halved until the wrong channels are found. These are pinned, with all other
    channels of the same layers. The dry run replaces random numbers by constants, and restores the random state.

    Args:
        model: A converted module; it is not changed.
        channels: The channels of the module.
        plan: A plan for the module.
        replay: A function that runs a training step or a forward pass on a given copy, with floating point inputs of
            the given dtype, and returns its outputs.

    Returns:
        The proved part of the plan, and the channels, of which the refuted ones are pinned.
    """
    if not plan:
        return plan, channels
    try:
        trial = _Trial(model, replay)
    except Exception as error:  # a network may raise any exception on a copy
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
    """Returns the names of the bit depths that produce each channel; channels with equal names are proved together."""
    found: dict[int, list[str]] = {}
    for slot in channels.slots:
        if slot.produces:
            for number in np.unique(channels.group[slot.atoms]).tolist():
                found.setdefault(number, []).append(slot.name)
    return {number: tuple(names) for number, names in found.items()}


def _units(channels: Channels, plan: RemovalPlan) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the channels of a plan, grouped by the layers that produce them."""
    signatures = _signatures(channels)
    units: dict[tuple[str, ...], list[int]] = {}
    for number in plan.channels:
        units.setdefault(signatures[number], []).append(number)
    return {key: tuple(numbers) for key, numbers in units.items()}


class Role(Enum):
    """The origin of an output of a step."""

    HIDDEN = "of a child of the network, which may lose channels"
    FINAL = "of the network itself"
    RETURNED = "returned by the step: a loss, mostly"


@dataclass(frozen=True, eq=False)
class _Output:
    role: Role
    value: Tensor


class _Trial:
    """The outputs of a network, with which the outputs after a removal are compared.

    The network runs in float64 if it can, otherwise in float32.
    """

    def __init__(self, model: nn.Module, replay: Replay) -> None:
        self._model, self._replay = model, replay
        self._gradients: list[dict[str, Tensor]] | None = None
        self._evaluates = False
        try:
            self._dtype, self._tolerance = torch.float64, 1e-10
            self._outputs = self._run(())
        except Exception:  # the code of some networks names a dtype
            self._dtype, self._tolerance = torch.float32, 1e-4
            self._outputs = self._run(())
        if not any(bool(output.value.isfinite().any()) for output in self._outputs):
            raise ValueError("no output of the step is finite")
        try:
            self._outputs += self._outputs_of(copy_module(model).to(self._dtype).eval())
            self._evaluates = True
        except Exception:  # a step that runs in training mode alone proves the plan for that mode
            return

    def holds(self, plan: RemovalPlan) -> bool:
        """Returns whether the outputs are the same after a plan was carried out on a copy.

        A loss may change by a penalty on the removed weights. If only losses differ, the plan holds if the gradients of
        all remaining entries are the same.
        """
        try:
            return self._holds(plan.edits)
        except Exception:  # a size written into the code may raise any exception, and so may a backward pass
            return False

    def _holds(self, edits: Sequence[Edit]) -> bool:
        outputs = self._run(edits)
        if len(outputs) != len(self._outputs):
            return False
        other = [one for one, now in zip(self._outputs, outputs, strict=True) if not self._same(one, now.value)]
        losses = all(one.role is Role.RETURNED and one.value.numel() == 1 for one in other)
        return not other or (losses and self._trains_alike(edits))

    def _copies(self, edits: Sequence[Edit]) -> Iterator[nn.Module]:
        """Yields the network after a removal as it is and, if the step runs in evaluation mode, in evaluation mode."""
        trained = copy_module(self._model).to(self._dtype)
        remove(trained, edits)
        evaluated = copy_module(trained).eval() if self._evaluates else None
        yield trained
        if evaluated is not None:
            yield evaluated

    def _run(self, edits: Sequence[Edit]) -> list[_Output]:
        return [output for net in self._copies(edits) for output in self._outputs_of(net)]

    def _outputs_of(self, net: nn.Module) -> list[_Output]:
        """Returns the outputs of the step, of the network, and of the direct children of the network."""
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
        kept = kept_entries(edits)
        for before, now in zip(self._gradients, self._gradients_of(edits), strict=True):
            if not now or before.keys() != now.keys():
                return False
            if not all(self._close(shrink(g, kept.get(name, {})), now[name]) for name, g in before.items()):
                return False
        return True

    def _gradients_of(self, edits: Sequence[Edit]) -> list[dict[str, Tensor]]:
        """Returns, for each copy, the gradients of the losses that its step returns, by name; none without a loss."""
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
    """Makes random numbers the same in every run and for all shapes; restores the states of the generators."""
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
    """Replaces random numbers by constants and turns dropout off, so that a smaller network sees the same numbers."""

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
