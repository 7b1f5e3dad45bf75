"""The conversion plan: which layers of a model are quantized and which stay in float, decided before any change."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import learned_names
from lightning_selfcompress.quantize.quantized_class import quantized_class
from lightning_selfcompress.quantize.registry import check_axis, is_known, is_registered, known_axes
from lightning_selfcompress.tensors import is_a, is_sharded, name_of

Skip = Sequence[str | type[nn.Module]]


Axes = Mapping[str, ChannelAxis | str]  # name of a parameter -> its axis, or why it stays in float


UNKNOWN = "there is no quantized class for it; register_layer tells where its output channels lie"


VECTORS = "one value per channel, no weight matrix"


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

    @property
    def undecided(self) -> tuple[str, ...]:
        """The names of parameters that could be weights, of which no layer type tells it."""
        unknown = (layer for layer in self.left_alone if layer.reason == UNKNOWN)
        return tuple(name for layer in (*unknown, *self.compressed) for name in self._others(layer))

    def _is_loose(self, layer: PlannedLayer) -> bool:
        """Returns whether a module's own parameters are no layer's: beside its children, or in a list of parameters."""
        module = self.model.get_submodule(layer.name)
        lists = isinstance(module, nn.ParameterList | nn.ParameterDict)
        return lists or (not is_known(module) and any(True for _ in module.children()))

    def _line(self, layers: Sequence[PlannedLayer], kind: str) -> str:
        """Returns the names of modules of a kind, or, without a kind, those of their parameters."""
        values = f"{sum(layer.numel for layer in layers):,} values"
        names = [layer.name or "the module itself" for layer in layers]
        if not kind:
            own = ((layer, self.model.get_submodule(layer.name)._parameters) for layer in layers)
            names = [name_of(layer.name, n) for layer, table in own for n, p in table.items() if p is not None]
        if not kind and len(names) == 1:
            return f"parameter {names[0]!r}, {values}"
        return f"{len(names)} {kind or 'parameters'} ({_first(names)}; {values})"

    def _others(self, layer: PlannedLayer) -> list[str]:
        """Returns the names of parameters of several dimensions of a module that are not quantized."""
        own = self.model.get_submodule(layer.name)._parameters.items()
        weights = dict(layer.weights)
        return [name_of(layer.name, n) for n, p in own if p is not None and p.dim() > 1 and n not in weights]

    @property
    def left_in_float(self) -> tuple[tuple[str, str], ...]:
        """What stays in float, in words, and why: one pair for all modules of one kind and one reason."""
        groups: dict[tuple[str, str], list[PlannedLayer]] = {}
        for layer in self.left_alone:
            groups.setdefault(("" if self._is_loose(layer) else layer.kind, layer.reason), []).append(layer)
        found = [(self._line(members, kind), reason) for (kind, reason), members in groups.items()]
        others = [name for layer in self.compressed for name in self._others(layer)]
        if others:
            found.append(("beside the weights of compressed layers", f"{_first(others)}, not known as weights"))
        return tuple(found)

    def __str__(self) -> str:
        kinds = Counter(layer.kind for layer in self.compressed)
        weights = sum(layer.numel for layer in self.compressed)
        lines = [f"Compressed: {weights:,} weights in {len(self.compressed)} layers"]
        lines[0] += f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
        left = [f"  {what}: {why}" for what, why in self.left_in_float]
        return "\n".join([*lines, *(["Left in float:"] if left else []), *left])


def plan_conversion(model: nn.Module, *, skip: Skip = (), axes: Axes | None = None) -> ConversionPlan:
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
        axes: The axes of weights that no layer type tells, given as in :func:`convert`.

    Returns:
        The plan, with one entry for each module that has parameters of its own.

    Raises:
        TypeError: If an entry of ``skip`` is neither a string nor a module type.
        ValueError: If an entry of ``skip`` matches no module, or if an axis in ``axes`` or of :func:`register_layer`
            does not fit its parameter.
    """
    skipped = _skipped(model, skip)
    given = _given(model, axes or {})
    fsdp = {id(inner) for m in model.modules() if is_a(m, "FSDPModule") for inner in m.modules()}
    found: dict[int, dict[str, ChannelAxis]] = {}  # id(module) -> the names and axes of its weights
    reasons: dict[int, str] = {}
    owners = [(name, m) for name, m in model.named_modules() if _is_owner(m)]
    for _, module in owners:
        unwanted = id(module) in skipped and not isinstance(module, Quantized)
        weights = {} if unwanted else _weights(module, given)
        reason = f"skip={skipped[id(module)]!r}" if unwanted else _obstacle(module, weights, given, id(module) in fsdp)
        if reason and isinstance(module, Quantized):  # what is found of it beside its quantized weights stays in float
            weights, reason = _weights(module, {}), ""
        if reason:
            reasons[id(module)] = reason
        else:
            found[id(module)] = weights
    _exclude_half_tied(owners, found, reasons)
    layers, counted = [], set[int]()
    for name, module in owners:
        weights = found.get(id(module), {})
        own = [module._parameters[n] for n in weights] if weights else list(module._parameters.values())
        fresh = [p for p in own if p is not None and id(p) not in counted and not is_lazy(p)]
        counted |= {id(p) for p in fresh}
        numel = sum(p.numel() for p in fresh)
        kind = _kind(module._float_class if isinstance(module, Quantized) else type(module))
        layers.append(PlannedLayer(name, kind, tuple(weights.items()), numel, reasons.get(id(module), "")))
    return ConversionPlan(tuple(layers), model)


def _first(names: Sequence[str]) -> str:
    """Returns the first three names, and dots where there are more."""
    return ", ".join([*map(repr, names[:3]), *["..."] * (len(names) > 3)])


def _kind(layer_class: type[nn.Module]) -> str:
    """Returns the name of a class, or of its first base that is public, if torch has the class for itself."""
    public = (b for b in layer_class.__mro__ if hasattr(nn, b.__name__) or not b.__module__.startswith("torch.nn."))
    return next(public, layer_class).__name__


def unmatched(model: nn.Module, skip: Skip) -> list[str | type[nn.Module]]:
    """Returns the entries of ``skip`` that match no module of ``model``."""
    return [entry for entry in skip if not _matches(model, entry)]


def _given(model: nn.Module, axes: Axes) -> dict[int, ChannelAxis | str]:
    """Maps the ids of parameters to the axes that were given for them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, axis in axes.items():
        if name not in parameters:
            near = get_close_matches(name, parameters, n=3) or list(parameters)[:3]
            raise ValueError(
                f"axes[{name!r}] is of no parameter of {type(model).__name__}. Expected one such as "
                f"{', '.join(map(repr, near))}."
            )
        if isinstance(axis, ChannelAxis):
            check_axis(parameters[name], axis, f"axes[{name!r}]")
    return {id(parameters[name]): axis for name, axis in axes.items()}


def _is_owner(module: nn.Module) -> bool:
    """Returns whether a module has parameters of its own, or was registered as one that has."""
    own = any(p is not None for p in module._parameters.values())
    return own or (not isinstance(module, Quantized) and is_registered(module))


def _weights(module: nn.Module, given: Mapping[int, ChannelAxis | str]) -> dict[str, ChannelAxis]:
    """Returns the names and axes of a module's weights: as quantized already, by its type, or as given."""
    known = (
        {name: spec.axis for name, spec in module._quantized.items()}
        if isinstance(module, Quantized)
        else known_axes(module)
    )
    for name, parameter in module._parameters.items():
        axis = given.get(id(parameter))
        if isinstance(axis, ChannelAxis) and name not in known and not _is_computed_from(module, name):
            known[name] = axis
    return known


def _is_computed_from(module: nn.Module, name: str) -> bool:
    """Returns whether a parameter is what a hook (weight_norm, spectral_norm, pruning) computes a weight from."""
    endings = ("_orig", "_v", "_g")
    return any(name.endswith(end) and name.removesuffix(end) in module.__dict__ for end in endings)


def _obstacle(
    module: nn.Module, weights: Mapping[str, ChannelAxis], given: Mapping[int, ChannelAxis | str], fsdp: bool
) -> str:
    """Returns why a module cannot be quantized, or an empty string.

    Args:
        module: The module.
        weights: The names and axes of its weights.
        given: As :func:`_given` returns it.
        fsdp: Whether FSDP2 manages the module.
    """
    done = module._quantized if isinstance(module, Quantized) else {}
    if weights and weights.keys() == done.keys():
        return ""
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return "lazy: its shapes are not known before the first batch; run one batch before training"
    if is_a(module, "ParametrizationList"):
        return "parametrized: torch.nn.utils.parametrize computes a weight from it"
    if not weights and not is_known(module):
        large = {name: p for name, p in module._parameters.items() if p is not None and p.dim() > 1}
        said = [f"{name} {given[id(p)]}" for name, p in large.items() if isinstance(given.get(id(p)), str)]
        return "; ".join(said) or (UNKNOWN if large else VECTORS)
    if is_parametrized(module):
        return "parametrized: its weight is computed by torch.nn.utils.parametrize"
    if type(module).__module__.startswith(("torch.ao.", "torch.nn.intrinsic", "torch.nn.qat")):
        return "quantized by torch.ao already"
    weights = {name: axis for name, axis in weights.items() if name not in done}
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
    if taken:
        return f"it has attributes named {', '.join(taken)} already"
    float_class = module._float_class if isinstance(module, Quantized) else type(module)
    try:
        quantized_class(float_class, (*done, *weights))
    except Exception as error:  # code of the user's class runs when a class is derived from it
        return f"no class can be derived from {float_class.__name__} ({type(error).__name__}: {error})"
    return ""


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
