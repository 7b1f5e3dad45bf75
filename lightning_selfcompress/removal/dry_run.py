"""The dry run, which carries out a removal on copies and compares their outputs before the network is changed.

Sizes that became Python numbers (``view(n, 2, 4)``, ``x.shape[1] ** -0.5``) do not show in the watched operations. The
dry run detects them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.removal import widths_around
from lightning_selfcompress.removal.head_sizes import choices
from lightning_selfcompress.removal.heads import parts_of_heads
from lightning_selfcompress.removal.plan import RemovalPlan, narrow
from lightning_selfcompress.removal.surgery import Edit
from lightning_selfcompress.removal.trial import Replay, Trial

_REASON = "its removal changed the outputs in a dry run (a size may be written into the code)"


def prove(
    model: nn.Module, channels: Channels, plan: RemovalPlan, steps: Sequence[Replay]
) -> tuple[RemovalPlan, Channels]:
    """Tries a removal on copies, whose outputs have to stay the same in every step.

    If the outputs differ, the plan is halved until the wrong channels are found. These are pinned, with all other
    channels of the same layers, and of the same layers of repeated blocks: the twelve blocks of a transformer are tried
    together and refuted together. For heads of attention the attributes that hold their number and width are tried with
    them; heads that no choice of attributes makes right stay, and so do positions within heads, each on its own. For
    all other channels the widths that modules around their layers hold in attributes are tried before they are pinned.

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
    units = _units(model, channels, plan)
    sizes, wrong = _head_sizes(model, channels, plan, units, trial)
    right: list[_Unit] = []

    def search(some: Sequence[_Unit]) -> None:
        tried = [*right, *some]
        if not some or trial.holds(_part(model, channels, plan, tried, sizes, "")):
            right.extend(some)
        elif len(some) == 1:
            (right if _with_widths(model, channels, plan, tried, sizes, trial) else wrong).extend(some)
        else:
            half = len(some) // 2
            search(some[:half])
            search(some[half:])

    refused = {unit.channels for unit in wrong}
    search([unit for unit in units if unit.channels not in refused])
    if not wrong and not sizes:
        return plan, channels
    reasons = {number: _reason(model, channels, unit) for unit in wrong for number in unit.channels}
    refuted = channels
    for unit in wrong:
        refuted = refuted.pin(unit.alike, reasons[unit.channels[0]])
    return _part(model, channels, plan, right, sizes, reasons), refuted


@dataclass(frozen=True, eq=False)
class _Unit:
    """Channels of a plan that are proved together.

    Args:
        channels: Their numbers.
        alike: What is pinned if they are refuted: the channels of the same layers, or their heads or positions.
        kind: 1 for whole heads of attention, 2 for positions within heads, 0 for any other channels.
    """

    channels: tuple[int, ...]
    alike: tuple[int, ...]
    kind: int


def _reason(model: nn.Module, channels: Channels, unit: _Unit) -> str:
    """Returns why refuted channels stay; for channels of heads, with the module that has a size in its code."""
    slots = (slot for slot in channels.slots if slot.produces and unit.kind)
    name = next((s.name for s in slots if np.isin(channels.group[s.atoms], unit.channels).any()), None)
    if name is None:
        return _REASON
    path = name.rpartition(".")[0]
    if not isinstance(model.get_submodule(path), nn.MultiheadAttention):
        path = path.rpartition(".")[0]
    kind = model.get_submodule(path)
    place = f"{(kind._float_class if isinstance(kind, Quantized) else type(kind)).__name__} at {path}"
    what = "the number of its heads" if unit.kind == _HEADS else "the width of its heads"
    return f"{place} has {what} in its code, or a size that follows from it (seen in a dry run)"


def _part(
    model: nn.Module,
    channels: Channels,
    plan: RemovalPlan,
    units: Sequence[_Unit],
    sizes: Mapping[_Unit, tuple[Edit, ...]],
    reason: str | Mapping[int, str],
) -> RemovalPlan:
    """Returns the plan for some units, with the attributes that change with them."""
    part = narrow(model, channels, plan, [number for unit in units for number in unit.channels], reason)
    return replace(
        part,
        edits=(
            *part.edits,
            *(edit for unit in sorted(units, key=lambda unit: unit.kind) for edit in sizes.get(unit, ())),
        ),
    )


def _head_sizes(
    model: nn.Module, channels: Channels, plan: RemovalPlan, units: Sequence[_Unit], trial: Trial
) -> tuple[dict[_Unit, tuple[Edit, ...]], list[_Unit]]:
    """Returns the attributes that change with units of heads, and the units for which no choice of them is right."""
    sizes: dict[_Unit, tuple[Edit, ...]] = {}
    wrong: list[_Unit] = []
    right: list[_Unit] = []
    for unit in sorted((unit for unit in units if unit.kind), key=lambda unit: unit.kind):
        tried = [*right, unit]
        edits = narrow(model, channels, plan, [number for one in tried for number in one.channels], "").edits
        for choice in choices(model, channels, edits):
            if trial.holds(_part(model, channels, plan, tried, {**sizes, unit: choice}, "")):
                sizes[unit] = choice
                right.append(unit)
                break
        else:
            depends = bool(wrong) and unit.kind == _POSITIONS  # they may be right without the heads that were refuted
            wrong.append(replace(unit, alike=()) if depends else unit)
    return {unit: choice for unit, choice in sizes.items() if choice}, wrong


def _with_widths(
    model: nn.Module,
    channels: Channels,
    plan: RemovalPlan,
    tried: Sequence[_Unit],
    sizes: dict[_Unit, tuple[Edit, ...]],
    trial: Trial,
) -> bool:
    """Returns whether the last of some units is right with other attributes, which are added to ``sizes``."""
    unit = tried[-1]
    for choice in widths_around.choices(model, narrow(model, channels, plan, unit.channels, "").edits):
        if trial.holds(_part(model, channels, plan, tried, {**sizes, unit: choice}, "")):
            sizes[unit] = choice
            return True
    return False


def _signatures(channels: Channels, pattern: Callable[[str], str]) -> dict[int, frozenset[str]]:
    """Returns the patterns of the bit depths that produce each channel; equal ones are proved together."""
    found: dict[int, set[str]] = {}
    for slot in channels.slots:
        if slot.produces:
            for number in np.unique(channels.group[slot.atoms]).tolist():
                found.setdefault(number, set()).add(pattern(slot.name))
    return {number: frozenset(names) for number, names in found.items()}


def _of_lines(channels: Channels, signatures: Mapping[int, frozenset[str]], kind: int) -> dict[int, frozenset[str]]:
    """Returns the patterns of all bit depths that produce each head or position, by its number."""
    found: dict[int, frozenset[str]] = {}
    for row in channels.cells.tolist():
        names = signatures.get(row[0], frozenset()) | signatures.get(row[kind], frozenset())
        found[row[kind]] = found.get(row[kind], frozenset()) | names
    return found


def _units(model: nn.Module, channels: Channels, plan: RemovalPlan) -> list[_Unit]:
    """Returns the channels of a plan, grouped by the layers that produce them, with heads and positions apart."""
    signatures = _signatures(channels, _Blocks.of(model).pattern)
    lines = {kind: _of_lines(channels, signatures, kind) for kind in (_HEADS, _POSITIONS)}
    kinds = parts_of_heads(channels, plan.channels)
    parts: dict[tuple[int, frozenset[str]], list[int]] = {}
    for number in plan.channels:
        kind, line = kinds.get(number, (0, number))
        parts.setdefault((kind, lines[kind][line] if kind else signatures[number]), []).append(number)
    units = []
    for (kind, signature), numbers in parts.items():
        alike = [number for number, other in lines.get(kind, signatures).items() if other == signature]
        units.append(_Unit(tuple(numbers), tuple(alike), kind))
    return units


_HEADS, _POSITIONS = 1, 2  # kinds of units, and the columns of these lines in the table of cells


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
