"""The conversion plan: which layers of a model are quantized and which stay in float, decided before any change."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_selfcompress.quantize.layers import ChannelAxis, Quantized
from lightning_selfcompress.quantize.parameters import learned_names
from lightning_selfcompress.quantize.registry import REGISTRY
from lightning_selfcompress.tensors import is_a, is_sharded, name_of

Skip = Sequence[str | type[nn.Module]]


@dataclass(frozen=True)
class PlannedLayer:
    """The decision about one module that has parameters of its own.

    Args:
        name: Path of the module in the model.
        kind: Name of the module's float class.
        weights: Names and channel axes of the weights that are quantized; empty if the module stays in float.
        numel: Number of entries of the quantized weights, or of all own parameters if the module stays in float. A tied
            parameter is counted only for the first module that has it, and a lazy parameter is not counted.
        reason: Why the module stays in float; empty if it is quantized.
    """

    name: str
    kind: str
    weights: tuple[tuple[str, ChannelAxis], ...]
    numel: int
    reason: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    """The plan that :func:`convert` carries out. Its string lists the compressed layers, and the others with reasons.

    Args:
        layers: One entry for each module that has parameters of its own.
        model: The model of the plan.
    """

    layers: tuple[PlannedLayer, ...]
    model: nn.Module = field(repr=False, compare=False)

    @property
    def compressed(self) -> tuple[PlannedLayer, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def left_alone(self) -> tuple[PlannedLayer, ...]:
        """The modules that stay in float, each with its reason."""
        return tuple(layer for layer in self.layers if layer.reason)

    def __str__(self) -> str:
        kinds = Counter(layer.kind for layer in self.compressed)
        weights = sum(layer.numel for layer in self.compressed)
        lines = [f"Compressed: {weights:,} weights in {len(self.compressed)} layers"]
        lines[0] += f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
        groups: dict[tuple[str, str], list[PlannedLayer]] = {}
        for layer in self.left_alone:
            groups.setdefault((layer.kind, layer.reason), []).append(layer)
        if groups:
            lines.append("Left in float:")
        for (kind, reason), members in groups.items():
            names = ", ".join([repr(m.name or "the module itself") for m in members[:3]] + ["..."] * (len(members) > 3))
            lines.append(f"  {len(members)} {kind} ({names}; {sum(m.numel for m in members):,} values): {reason}")
        return "\n".join(lines)


def plan_conversion(model: nn.Module, *, skip: Skip = ()) -> ConversionPlan:
    """Plans which layers :func:`convert` would quantize, without changing the model.

    >>> from torch import nn
    >>> from lightning_selfcompress import plan_conversion
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> print(plan_conversion(net, skip=["2"]))
    Compressed: 12 weights in 1 layers (1 Linear)
    Left in float:
      1 LayerNorm ('1'; 6 values): one value per channel, no weight matrix
      1 Linear ('2'; 8 values): skip='2'

    Args:
        model: Any module.
        skip: The modules that stay in float, given as in :func:`convert`.

    Returns:
        The plan, with one entry for each module that has parameters of its own.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string nor a module type.
        ValueError: If an entry of ``skip`` matches no module.
    """
    skipped = _skipped(model, skip)
    fsdp = {id(inner) for m in model.modules() if is_a(m, "FSDPModule") for inner in m.modules()}
    axes: dict[int, dict[str, ChannelAxis]] = {}  # id(module) -> the names and axes of its weights
    reasons: dict[int, str] = {}
    owners = [(name, m) for name, m in model.named_modules() if any(p is not None for p in m._parameters.values())]
    for _, module in owners:
        unwanted = id(module) in skipped and not isinstance(module, Quantized)
        reason = f"skip={skipped[id(module)]!r}" if unwanted else _obstacle(module, id(module) in fsdp)
        if reason:
            reasons[id(module)] = reason
        else:
            axes[id(module)] = _weights(module)
    _exclude_half_tied(owners, axes, reasons)
    layers, counted = [], set[int]()
    for name, module in owners:
        weights = axes.get(id(module), {})
        own = [module._parameters[n] for n in weights] if weights else list(module._parameters.values())
        fresh = [p for p in own if p is not None and id(p) not in counted and not is_lazy(p)]
        counted |= {id(p) for p in fresh}
        numel = sum(p.numel() for p in fresh)
        kind = (module._float_class if isinstance(module, Quantized) else type(module)).__name__
        layers.append(PlannedLayer(name, kind, tuple(weights.items()), numel, reasons.get(id(module), "")))
    return ConversionPlan(tuple(layers), model)


def unmatched(model: nn.Module, skip: Skip) -> list[str | type[nn.Module]]:
    """Returns the entries of ``skip`` that match no module of ``model``."""
    return [entry for entry in skip if not _matches(model, entry)]


def _weights(module: nn.Module) -> dict[str, ChannelAxis]:
    if isinstance(module, Quantized):
        return {name: spec.axis for name, spec in module._quantized.items()}
    return next(find(module) for kind, find in REGISTRY.items() if isinstance(module, kind))


def _obstacle(module: nn.Module, fsdp: bool) -> str:
    """Returns why a module cannot be quantized, or an empty string; ``fsdp`` says whether FSDP2 manages the module."""
    if isinstance(module, Quantized):
        return ""
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return "lazy: its shapes are not known before the first batch; run one batch before training"
    if not isinstance(module, tuple(REGISTRY)):
        large = any(p is not None and p.dim() > 1 for p in module._parameters.values())
        return "there is no quantized class for it" if large else "one value per channel, no weight matrix"
    if is_parametrized(module):
        return "parametrized: its weight is computed by torch.nn.utils.parametrize"
    if type(module).__module__.startswith(("torch.ao.", "torch.nn.intrinsic", "torch.nn.qat")):
        return "quantized by torch.ao already"
    weights = _weights(module)
    for name in weights:
        obstacle = _weight_obstacle(module, name, fsdp)
        if obstacle:
            return obstacle
    if not weights:
        return "its weight is recomputed by a hook (weight_norm, spectral_norm or pruning)"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites its weight during forward"
    if getattr(module, "sparse", False):
        return "sparse=True: the size of its weights has a dense gradient"
    taken = [n for names in map(learned_names, weights) for n in names if hasattr(module, n)]
    return f"it has attributes named {', '.join(taken)} already" if taken else ""


def _weight_obstacle(module: nn.Module, name: str, fsdp: bool) -> str:
    parameter = module._parameters.get(name)
    if parameter is None or name in module.__dict__ or hasattr(type(module), name):
        return f"its {name} is recomputed by a hook or property (weight_norm, spectral_norm, pruning or its own)"
    whole_in_forward = fsdp and is_sharded(parameter) and parameter.device_mesh.ndim == 1  # type: ignore[attr-defined]
    if type(parameter) is not nn.Parameter and not whole_in_forward:
        return f"its {name} is a {type(parameter.data).__name__}, quantized or sharded elsewhere"
    if not parameter.is_floating_point():
        return f"its {name} holds {parameter.dtype} numbers"
    if parameter.device.type == "meta":
        return f"its {name} is on the meta device, not materialized yet"
    if parameter.numel() == 0:
        return f"its {name} is empty"
    return ""


def _exclude_half_tied(
    owners: Iterable[tuple[str, nn.Module]], axes: dict[int, dict[str, ChannelAxis]], reasons: dict[int, str]
) -> None:
    """Excludes layers whose weight another module uses in float, and gives tied weights the axis of the first."""
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in owners:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((path, module, name))
    tied = [group for group in users.values() if len(group) > 1]
    changed = True
    while changed:
        changed = False
        for group in tied:
            outside = [(path, name) for path, m, name in group if name not in axes.get(id(m), {})]
            for _, module, name in group:
                if outside and name in axes.get(id(module), {}):
                    path, other = outside[0]
                    del axes[id(module)]
                    reasons[id(module)] = f"its {name} is tied to {name_of(path, other)!r}, which stays in float"
                    changed = True
    for group in tied:
        if all(name in axes.get(id(m), {}) for _, m, name in group):
            _, first, first_name = next((g for g in group if isinstance(g[1], Quantized)), group[0])
            for _, module, name in group:
                axes[id(module)][name] = axes[id(first)][first_name]


def _skipped(model: nn.Module, skip: Skip) -> dict[int, str]:
    """Maps the id of each module that ``skip`` matches, or contains, to the matching entry of ``skip``."""
    found: dict[int, str] = {}
    for entry in (skip,) if isinstance(skip, (str, type)) else skip:
        hits = _matches(model, entry)
        if not hits:
            names = [name for name, _ in model.named_modules() if name]
            near = get_close_matches(str(entry), names, n=3) or names[:3]
            raise ValueError(
                f"skip={entry!r} matches no module of {type(model).__name__}. Expected a name, a pattern or a type "
                f"among its modules, for example {', '.join(map(repr, near))}."
            )
        text = entry if isinstance(entry, str) else entry.__name__
        found |= {id(inner): text for m in hits for inner in m.modules()}
    return found


def _matches(model: nn.Module, entry: str | type[nn.Module]) -> list[nn.Module]:
    """Returns the modules that one entry of ``skip`` matches."""
    named = list(model.named_modules(remove_duplicate=False))
    if isinstance(entry, str):
        return [m for name, m in named if name and fnmatchcase(name, entry)]
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return [m for _, m in named if isinstance(m, entry)]
    raise TypeError(f"Expected module names, patterns or nn.Module types in skip, got {entry!r}.")
