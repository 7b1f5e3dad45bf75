"""Which parameters are weights, and along which dimension their output channels lie, read off the operations of a step.

A parameter is a weight where an operation multiplies it with data and sums the products: in a matrix product, a
convolution or an embedding, in any orientation, through transposes, views, picked entries and scales, or entry by entry
where the product is summed over at once, as the attention vectors of graph networks are.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lightning_selfcompress.channels.atoms import AtomStore
from lightning_selfcompress.channels.call import Call
from lightning_selfcompress.channels.dispatch import showing, unwatched
from lightning_selfcompress.channels.rules.reductions import reduced_dims
from lightning_selfcompress.channels.rules.reshapes import blocks
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.layers import Quantized, reading_through
from lightning_selfcompress.tensors import own_tensors, stored_tensors

Labels = tuple[frozenset[int], ...]  # for each dimension of a tensor, the dimensions of a parameter that vary along it


NOT_SEEN = "was in no matrix product with data, no convolution and no embedding in the first training step"


_NONE: frozenset[int] = frozenset()


_ORIGIN = "_selfcompress_origin"  # the attribute of a tensor that holds its origin; an id would be reused


_SCALED = "_selfcompress_scaled"  # the attribute of a product with data that holds the parameters, as in ``sources``


_COPIES = ("_to_copy", "clone", "detach", "alias")


@dataclass(frozen=True, eq=False)
class Origin:
    """The origin of a tensor that was computed from parameters and buffers alone.

    Args:
        sources: Id of each parameter whose entries were only moved or scaled -> where its dimensions are now.
        trained: Whether parameters took part, so that a product with the tensor is no product with data.
    """

    sources: Mapping[int, Labels]
    trained: bool


@dataclass(frozen=True)
class Use:
    """The use of a parameter in one product.

    Args:
        name: Name of the operation.
        out: The dimensions of the parameter that vary along the output channels.
        summed: Those that are summed over.
        groups: Number of groups of a transposed convolution, which lie along dimension 0; 1 for everything else.
    """

    name: str
    out: frozenset[int]
    summed: frozenset[int]
    groups: int = 1


class WeightRoles:
    """Watches operations within its context and says what each parameter is used for.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress.channels.weight_roles import WeightRoles
    >>> class Columns(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(4, 3))
    ...     def forward(self, x):
    ...         return torch.addmm(torch.zeros(3), x, self.weight)
    >>> net = Columns()
    >>> with WeightRoles(net) as roles:
    ...     out = net(torch.randn(2, 4))
    >>> roles.axes()
    {'weight': ChannelAxis(dim=1, groups=1)}

    Args:
        model: Any module; the weights that are quantized already are not looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        latent = {id(m.latent(n)) for m in model.modules() if isinstance(m, Quantized) for n in m._quantized}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._stored: dict[int, Origin] = {}
        for module in model.modules():
            for _, tensor in own_tensors(module):
                self._add(tensor, wanted=isinstance(tensor, nn.Parameter) and id(tensor) not in latent)
        self._uses: dict[int, list[Use]] = {}
        self._scales: set[int] = set()  # ids of parameters that scale data, without a sum that follows at once
        self._exit = ExitStack()

    def _add(self, tensor: Tensor, *, wanted: bool) -> None:
        trained = isinstance(tensor, nn.Parameter)
        sources: dict[int, Labels] = {}
        if wanted and tensor.dim() > 1 and tensor.is_floating_point():
            self._shapes[id(tensor)] = tuple(tensor.shape)
            sources[id(tensor)] = tuple(frozenset({d}) for d in range(tensor.dim()))
        self._stored[id(tensor)] = Origin(sources, trained)

    def __enter__(self) -> "WeightRoles":
        with ExitStack() as stack:
            stack.enter_context(reading_through(self._read))
            stack.enter_context(showing(self._visit))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def axes(self) -> dict[str, ChannelAxis | str]:
        """Returns the axis of every parameter that is a weight, or why a parameter of several dimensions is none."""
        wanted = ((name, id(tensor)) for name, tensor in stored_tensors(self._model).items())
        return {name: axis_of(self._shapes[key], self._uses_of(key)) for name, key in wanted if key in self._shapes}

    def _uses_of(self, key: int) -> list[Use]:
        """Returns the uses of a parameter; that it scales data counts where a sum of such products would be a use."""
        uses = self._uses.get(key, [])
        scales = key in self._scales and any(use.name == "sum" for use in uses)
        return [*uses, Use("mul", _NONE, _NONE)] if scales else uses

    def _read(self, layer: Quantized, name: str) -> Tensor:
        with unwatched():
            value = layer._quantized_weight(name)
        value.__dict__[_ORIGIN] = Origin({}, True)
        return value

    def _origin(self, tensor: Tensor) -> Origin | None:
        return self._stored.get(id(tensor)) or getattr(tensor, _ORIGIN, None)

    def _visit(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = Call(func, args, kwargs, out, AtomStore(), lambda _: None)
        origins = [self._origin(t) for t in call.inputs]
        self._follow_scaled(call, origins)
        if not any(origins):
            return
        roles = _roles(call)
        for tensor, role in roles:
            self._note(call, tensor, role, [other for other, _ in roles if other is not tensor])
        picks = call.name in ("index", "index_select")  # rows that data picks are data, and entries of a weight still
        if not (origins[0] if picks else all(origins)):
            return
        trained = all(origins) and any(origin.trained for origin in origins if origin is not None)
        for i, output in enumerate(call.outputs):
            if id(output) not in self._stored:
                output.__dict__[_ORIGIN] = Origin(self._moved(call, i) if not roles else {}, trained)

    def _follow_scaled(self, call: Call, origins: Sequence[Origin | None]) -> None:
        """Follows products of parameters with data, entry by entry, until they are summed over or used otherwise."""
        found: dict[int, Labels] = {}
        for tensor in call.inputs:
            scaled: dict[int, Labels] = getattr(tensor, _SCALED, {})
            if call.name in _COPIES:
                found |= scaled
            elif call.name == "sum":
                reduced = reduced_dims(call, tensor.dim())
                for key, labels in scaled.items():
                    self._note_sum(key, labels, reduced)
            else:
                self._scales |= scaled.keys()
        if call.name.rstrip("_") == "mul" and len(origins) == 2 and None in origins:
            factor = next((origin for origin in origins if origin is not None), None)
            for key, labels in factor.sources.items() if factor is not None else ():
                found[key] = (_NONE,) * (len(call.shape) - len(labels)) + labels
        for output in call.outputs if found else ():
            output.__dict__[_SCALED] = found

    def _note_sum(self, key: int, labels: Labels, reduced: set[int]) -> None:
        """Notes the sum of products of a parameter with data over dimensions, if the parameter varies along some."""
        several = {d for d, size in enumerate(self._shapes[key]) if size > 1}
        out, summed = (
            frozenset().union(*(at for d, at in enumerate(labels) if (d in reduced) is wanted))
            for wanted in (False, True)
        )
        if out & several and summed & several:
            self._add_use(key, Use("sum", out & several, summed & several))
        else:
            self._scales.add(key)

    def _add_use(self, key: int, use: Use) -> None:
        if use not in self._uses.setdefault(key, []):
            self._uses[key].append(use)

    def _note(self, call: Call, tensor: Tensor, role: Sequence[str], others: Iterable[Tensor]) -> None:
        """Notes the use of the parameters that a factor of a product came from, if another factor is data."""
        origin = self._origin(tensor)
        if origin is None or any(known.trained for t in others if (known := self._origin(t)) is not None):
            return
        for key, labels in origin.sources.items():
            out, summed = (
                frozenset().union(*(at for at, part in zip(labels, role, strict=True) if part == wanted))
                for wanted in ("out", "in")
            )
            groups = int(call["groups"]) if "conv" in call.name and call["transposed"] else 1
            if groups > 1 and any(at != {d} for d, at in enumerate(labels)):
                continue  # the channels of the groups lie elsewhere
            self._add_use(key, Use(call.name, out, summed, groups))

    def _moved(self, call: Call, number: int) -> dict[int, Labels]:
        """Returns where the dimensions of parameters are in one of an operation's outputs."""
        move = MOVES.get(call.name.rstrip("_"))
        found: dict[int, Labels] = {}
        for tensor in call.inputs if move is not None else ():
            origin = self._origin(tensor)
            for key, labels in origin.sources.items() if origin is not None else ():
                moved = move(call, tensor, labels) if move is not None else None
                if moved is not None and len(moved) == call.outputs[number].dim():
                    found[key] = moved
        return found


def axis_of(shape: tuple[int, ...], uses: Sequence[Use]) -> ChannelAxis | str:
    """Returns the axis of the output channels of a parameter that is used so, or what keeps it from having one.

    The output channels lie along the dimension that the products keep. Along dimension 0 there may be others beside
    them: experts, or heads, each of which has channels of its own.

    Args:
        shape: The shape of the parameter.
        uses: Its uses.
    """
    if not uses:
        return NOT_SEEN
    found = {_axis_of_use(shape, use): use.name for use in uses}
    if len(found) == 1:
        return next(iter(found))
    ways = [f"{name}: {_said(axis)}" for axis, name in found.items()]
    return f"is used in ways that disagree about its output channels ({', '.join(ways)})"


def _said(axis: ChannelAxis | str) -> str:
    if isinstance(axis, str):
        return axis
    return f"dimension {axis.dim}" + (f" in {axis.groups} groups" if axis.groups > 1 else "")


def _axis_of_use(shape: tuple[int, ...], use: Use) -> ChannelAxis | str:
    if use.groups > 1:
        return ChannelAxis(1, use.groups)
    several = {d for d, size in enumerate(shape) if size > 1}
    if use.out & use.summed & several:
        return "has dimensions of which a part is summed over"
    out = sorted(use.out & several, key=lambda d: shape[d])
    beside = several - use.summed  # along these, each entry is a weight of its own or makes channels of its own
    alone = [d for d in range(len(shape)) if d not in several]
    if not out and (beside or not alone):
        return "makes no output channels"
    dim = next((d for d in reversed(out) if d > 0), out[0]) if out else alone[0]
    groups = shape[0] if dim > 0 and 0 in beside else 1
    return ChannelAxis(dim, groups) if math.prod(shape) > shape[dim] * groups else "has one value per channel"


Move = Callable[[Call, Tensor, Labels], Labels | None]


def _same(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    """Handles operations along dimensions that stay, beside which new ones may come first."""
    return (_NONE,) * (len(call.shape) - len(labels)) + labels


def _scaled(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    """Handles operations that scale entries; an operand that is broadcast is a scale itself."""
    return labels if tuple(tensor.shape) == call.shape else None


def _reshape(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    moved = [_NONE] * len(call.shape)
    for ins, outs in blocks(tuple(tensor.shape), call.shape):
        for o in outs:
            moved[o] = frozenset().union(*(labels[i] for i in ins))
    return tuple(moved)


def _transpose(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    moved = list(labels)
    if len(moved) > 1:
        one, other = (0, 1) if call.name.rstrip("_") == "t" else (call["dim0"], call["dim1"])
        moved[one], moved[other] = moved[other], moved[one]
    return tuple(moved)


def _unsqueeze(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    at = call["dim"] % (len(labels) + 1)
    return (*labels[:at], _NONE, *labels[at:])


def _squeeze(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    kept = iter([at for at, n in zip(labels, tensor.shape, strict=True) if n != 1])
    return tuple(next(kept) if n != 1 else _NONE for n in call.shape)


def _picked(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    at = call["dim"] % len(labels)
    return (*labels[:at], *labels[at + 1 :])


def _index(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    """Handles ``weight[numbers]`` along one dimension."""
    given = [(d, t) for d, t in enumerate(call["indices"]) if t is not None]
    if len(given) != 1 or not any(t is tensor for t in call.inputs[:1]):
        return None
    d, numbers = given[0]
    mask = str(numbers.dtype) in ("torch.bool", "torch.uint8")
    gone, new = (numbers.dim(), 1) if mask else (1, numbers.dim())
    return (*labels[:d], *[_NONE] * new, *labels[d + gone :])


def _stack(call: Call, tensor: Tensor, labels: Labels) -> Labels | None:
    at = call["dim"] % (len(labels) + 1)
    return (*labels[:at], _NONE, *labels[at:])


MOVES: dict[str, Move] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "view_copy", "reshape"), _reshape),
    **dict.fromkeys(("t", "transpose"), _transpose),
    "permute": lambda call, tensor, labels: tuple(labels[d] for d in call["dims"]),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "stack": _stack,
    **dict.fromkeys(("select", "unbind"), _picked),
    "index": _index,
    **dict.fromkeys(("mul", "div", "neg", "masked_fill", "tril", "triu"), _scaled),
    **dict.fromkeys(("expand", "repeat", "clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous"), _same),
    **dict.fromkeys(("slice", "index_select", "flip", "roll", "cat"), _same),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _same),
}


Role = tuple[str, ...]  # what each dimension of a factor is in a product: "out", "in" (summed over) or "beside"


def _roles(call: Call) -> list[tuple[Tensor, Role]]:
    """Returns the factors of a sum of products, each with what its dimensions are there; nothing for another operation.

    Factors that are no weights, such as the images of a convolution, have no roles of their own: "beside" everywhere.
    """
    name, tensors = call.name.rstrip("_"), call.inputs
    if name in _ADDING:
        tensors = tensors[1:]
    if name in ("mm", "addmm", "_addmm_activation"):
        return [(tensors[0], ("out", "in")), (tensors[1], ("in", "out"))]
    if name in ("bmm", "baddbmm"):
        return [(tensors[0], ("beside", "out", "in")), (tensors[1], ("beside", "in", "out"))]
    if name in ("mv", "addmv"):
        return [(tensors[0], ("out", "in")), (tensors[1], ("in",))]
    if name == "_grouped_mm":
        one, other = tensors[:2]
        lead = ("beside",) * (other.dim() - 2)
        return [(one, ("beside",) * one.dim()), (other, (*lead, "in", "out"))]
    if name == "linear":
        return [(tensors[0], ("beside",) * tensors[0].dim()), (tensors[1], ("out", "in"))]
    if name in ("convolution", "convolution_overrideable"):
        x, weight = call["input"], call["weight"]
        first: Role = ("in", "out") if call["transposed"] else ("out", "in")
        return [(x, ("beside",) * x.dim()), (weight, (*first, *["in"] * (weight.dim() - 2)))]
    if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        return [(call["weight"], ("in", "out"))]
    if name == "_trilinear" and tuple(call["i2"].shape[:1]) == tuple(call.shape[-1:]):
        weight = call["i2"]
        others = [(call[i], ("beside",) * call[i].dim()) for i in ("i1", "i3")]
        return [*others, (weight, ("out", *["in"] * (weight.dim() - 1)))]
    return []


_ADDING = frozenset({"addmm", "_addmm_activation", "baddbmm", "addmv"})  # operations whose first tensor is added
