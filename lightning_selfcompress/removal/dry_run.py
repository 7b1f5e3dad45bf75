"""The dry run, which carries out a removal on copies and compares their outputs before the network is changed.

Sizes that became Python numbers (``view(n, 2, 4)``, ``x.shape[1] ** -0.5``) do not show in the watched operations. The
dry run detects them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.removal.plan import RemovalPlan, narrow
from lightning_selfcompress.removal.trial import Replay, Trial

_REASON = "its removal changed the outputs in a dry run (a size may be written into the code)"


def prove(
    model: nn.Module, channels: Channels, plan: RemovalPlan, steps: Sequence[Replay]
) -> tuple[RemovalPlan, Channels]:
    """Tries a removal on copies, whose outputs have to stay the same in every step.

    If the outputs differ, the plan is halved until the wrong channels are found. These are pinned, with all other
    channels of the same layers, and of the same layers of repeated blocks: the twelve blocks of a transformer are tried
    together and refuted together.

    Args:
        model: A converted module; it is not changed.
        channels: The channels of the module.
        plan: A plan for the module.
        steps: The steps to replay.

    Returns:
        The proved part of the plan, and the channels, of which the refuted ones are pinned.
    """
    if not plan:
        return plan, channels
    try:
        trial = Trial(model, steps)
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

    signatures = _signatures(channels, _Blocks.of(model).pattern)
    units = _units(signatures, plan)
    search(list(units.values()))
    if not wrong:
        return plan, channels
    refuted = {key for key, unit in units.items() if not set(unit).isdisjoint(wrong)}
    alike = [n for n, key in signatures.items() if key in refuted]
    return narrow(model, channels, plan, right, _REASON), channels.pin(alike, _REASON)


def _signatures(channels: Channels, pattern: Callable[[str], str]) -> dict[int, frozenset[str]]:
    """Returns the patterns of the bit depths that produce each channel; equal ones are proved together."""
    found: dict[int, set[str]] = {}
    for slot in channels.slots:
        if slot.produces:
            for number in np.unique(channels.group[slot.atoms]).tolist():
                found.setdefault(number, set()).add(pattern(slot.name))
    return {number: frozenset(names) for number, names in found.items()}


def _units(signatures: dict[int, frozenset[str]], plan: RemovalPlan) -> dict[frozenset[str], tuple[int, ...]]:
    """Returns the channels of a plan, grouped by the layers that produce them."""
    units: dict[frozenset[str], list[int]] = {}
    for number in plan.channels:
        units.setdefault(signatures[number], []).append(number)
    return {key: tuple(numbers) for key, numbers in units.items()}


@dataclass(frozen=True)
class _Blocks:
    """The repeated blocks of a network: siblings of the same class with the same parameters, such as encoder layers.

    Args:
        common: Path of a block -> the last part of the path of the first block like it, with a star.
    """

    common: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "_Blocks":
        common: dict[str, str] = {}
        for path, parent in model.named_modules():
            alike: dict[tuple[type[nn.Module], tuple[str, ...]], str] = {}
            for name, block in _with_children(parent.named_children()):
                key = type(block), tuple(n for n, _ in block.named_parameters())
                common[f"{path}.{name}".lstrip(".")] = alike.setdefault(key, f"{name}*")
        return cls(common)

    def pattern(self, name: str) -> str:
        """Returns the name of a tensor, the same for a layer in all blocks that are alike."""
        parts = name.split(".")
        return ".".join(self.common.get(".".join(parts[: i + 1]), part) for i, part in enumerate(parts))


def _with_children(named: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    return ((name, module) for name, module in named if any(True for _ in module.children()))
