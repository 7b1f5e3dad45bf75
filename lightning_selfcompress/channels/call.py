"""One operation as a rule sees it: the arguments by name, and the known channels of the tensors."""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import HigherOrderOperator

from lightning_selfcompress.channels.atoms import (
    UNIFORM,
    Atoms,
    AtomStore,
    Axis,
    Dim,
    Dims,
    Flags,
    Grid,
    everywhere,
)
from lightning_selfcompress.channels.layout import Constant, Layout, never_zero
from lightning_selfcompress.tensors import tensors_in

Result = list[Dims | None]  # the dimensions of each tensor that an operation returns; None if they are unknown


Rule = Callable[["Call"], Result]


NEEDS_ALL = "needs every channel of its input"


FIXED_SIZE = "combines it with a tensor of a fixed size, such as an input or a constant"


MOST_CHANNELS = 2**20  # a longer dimension of a new tensor is taken for positions


@cache
def name_of(func: Any) -> str:
    """Returns the name of an operation without its namespace and its overload."""
    name: str = func.name() if isinstance(func, HigherOrderOperator) else func._schema.name
    return name.rpartition("::")[2]


@cache
def _declared(func: Any) -> dict[str, tuple[int, Any]]:
    """Returns the position and the default value of every argument of an operation, by name."""
    if isinstance(func, HigherOrderOperator):  # has no schema, but a method with the arguments
        _, *parameters = signature(type(func).__call__).parameters.values()
        return {p.name: (i, p.default) for i, p in enumerate(parameters)}
    return {declared.name: (i, declared.default_value) for i, declared in enumerate(func._schema.arguments)}


@cache
def written_arguments(func: Any) -> tuple[str, ...]:
    """Returns the names of the arguments that an operation writes to."""
    return tuple(a.name for a in _arguments(func) if a.alias_info is not None and a.alias_info.is_write)


@cache
def writes_out(func: Any) -> bool:
    """Returns whether an operation writes its results to tensors that are given for them, as ``out=`` does."""
    return any(a.kwarg_only and a.name in written_arguments(func) for a in _arguments(func))


def _arguments(func: Any) -> Sequence[Any]:
    return () if isinstance(func, HigherOrderOperator) else func._schema.arguments


def _flags(known: Flags, zero: Callable[[Flags], bool]) -> Flags:
    """Returns ``zero`` of the flags ``(operands, positions)`` at each position, ``(positions,)``."""
    if (known == known[:, :1]).all():  # the common case: the flags are the same at all positions
        return everywhere(zero(known[:, 0]), known.shape[1])
    patterns, where = np.unique(known, axis=1, return_inverse=True)
    return np.array([zero(p) for p in patterns.T])[where.reshape(-1)]


class Call:
    """An operation that has just run.

    Args:
        func: The ATen operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its return value.
        store: The store that receives the ties and pins.
        layout_of: A function that returns the layout of a tensor, or None if nothing is known of the tensor.
        place: A function that adds the place where it runs to the name of an operation.

    Attributes:
        inputs: All tensors among the arguments, in order.
        layouts: The layout of each input, or None if nothing is known of the input.
        outputs: All tensors in the return value, in order.
        reduces: Whether the operation is a reduction; its rule says so.
        makes_nought: Whether the operation makes the number zero; its rule says so.
        is_new: Whether the outputs take at most their dtype and device from the inputs; the rule says so.
        supposes: Whether a rule is asked, for a trial, what would be zero if buffers faded; it pins nothing then.
    """

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        store: AtomStore,
        layout_of: Callable[[Tensor], Layout | None],
        place: Callable[[str], str] = str,
    ) -> None:
        self.func, self.args, self.kwargs, self.store = func, args, kwargs, store
        self.inputs = tensors_in((args, kwargs))
        self.layouts = [layout_of(t) for t in self.inputs]
        self.outputs = tensors_in(out)
        self._layout_of, self._place = layout_of, place
        self._owed: list[tuple[Atoms, str]] = []
        self.name = name_of(func)
        self.reduces = self.makes_nought = self.is_new = self.supposes = False

    def __getitem__(self, argument: str) -> Any:
        """Returns the value of an argument, or its default."""
        i, default = _declared(self.func)[argument]
        return self.args[i] if i < len(self.args) else self.kwargs.get(argument, default)

    def get(self, argument: str) -> Any:
        """Returns the value of an argument, its default, or None if the operation has no argument of this name."""
        return self[argument] if argument in _declared(self.func) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first tensor that the operation returned."""
        return tuple(self.outputs[0].shape)

    def dims(self, tensor: Tensor) -> Dims:
        """Returns the dimensions of a tensor, with None for each of them if nothing is known of the tensor."""
        layout = self._layout_of(tensor)
        if layout is None:
            return (None,) * tensor.dim()
        return tuple(None if isinstance(d, Axis) and self.store.is_fixed(d.atoms) else d for d in layout.dims)

    def is_nought(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is the number zero, as the program has it."""
        layout = self._layout_of(tensor)
        return layout is not None and layout.is_nought

    def blank(self, sizes: Sequence[int], *, zero: bool) -> Dims:
        """Returns the dimensions of a new tensor that is filled with one number, zero or another."""
        return tuple(Axis(self.store.blank(n), everywhere(zero, n)) if 1 < n <= MOST_CHANNELS else None for n in sizes)

    def produced(self, weight: Tensor) -> Axis | None:
        """Returns the axis of the bit depths, for a quantized weight whose output channels lie along two dimensions."""
        layout = self._layout_of(weight)
        return None if layout is None else layout.produced

    @property
    def constant(self) -> Constant | None:
        """The origin of the outputs, if they are computed from inputs that are all computed from parameters alone."""
        if self.is_new or not self.layouts:
            return None
        found = []
        for layout in self.layouts:
            if layout is None or layout.constant is None:
                return None
            found.append(layout.constant)
        return Constant(
            frozenset().union(*(c.parameters for c in found)),
            (*{id(debt): debt for c in found for debt in c.owed}.values(), *self._owed),
            self.reduces or any(c.reduced for c in found),
        )

    @property
    def stored(self) -> bool:
        """Whether the outputs are computed from parameters and buffers alone."""
        known = [layout is not None and layout.stored for layout in self.layouts]
        return not self.is_new and bool(known) and all(known)

    def why(self, text: str) -> str:
        """Returns a reason that begins with the module or the operation that gives it."""
        return f"{self._place(self.name)} {text}"

    def pin(self, dim: Dim, text: str = NEEDS_ALL) -> None:
        """Pins the channels along a dimension."""
        if isinstance(dim, Axis):
            self.store.pin(dim.atoms, self.why(text))

    def pin_or_owe(self, dim: Dim, text: str = NEEDS_ALL) -> None:
        """Pins the channels along a dimension; if the outputs come from parameters alone, only once they meet data."""
        if isinstance(dim, Axis) and self.constant is not None:
            self._owed.append((dim.atoms, self.why(text)))
        else:
            self.pin(dim, text)

    def pin_all(self, text: str) -> Result:
        """Pins the channels of all inputs and returns a result in which nothing is known of the outputs."""
        for tensor in self.inputs:
            for dim in self.dims(tensor):
                self.pin(dim, text)
        return [None] * len(self.outputs)

    def tie(self, one: Atoms, other: Atoms) -> None:
        """Ties the atoms at equal positions of two arrays."""
        self.store.tie(one, other, self.why(FIXED_SIZE))

    def grid(self, cells: Atoms, rows: Atoms, columns: Atoms, *, merges: bool = False, wide: bool = True) -> Atoms:
        """Notes the cells of a dimension that is split into two, or into which two are merged; returns the cells."""
        text = "merges channels of two dimensions" if merges else "cuts its channels into parts of a given size"
        self.store.grids.append(Grid(cells, rows, columns, merges, wide, self.why(text)))
        return cells

    def align(self, axis: Axis, rows: int) -> Axis:
        """Ties ``rows`` equal parts of an axis and returns the first part, zero where all parts are zero."""
        atoms, zero = axis.atoms.reshape(rows, -1), axis.zero.reshape(rows, -1)
        for row in atoms[1:]:
            self.tie(atoms[0], row)
        return Axis(atoms[0], np.asarray(zero.all(0)))

    def meet(self, dims: Sequence[Dim], sizes: Sequence[int], *, zero: Callable[[Flags], bool]) -> Dim:
        """Combines one dimension of the operands of an elementwise operation.

        Args:
            dims: The dimension in each operand.
            sizes: The size of the dimension in each operand; 1 where the operand is broadcast.
            zero: A function from a flag for each operand, whether the operand is zero, to whether the result is zero.

        Returns:
            The dimension of the result.
        """
        if not any(dims):
            return None
        size = max(sizes)
        axes = [d for d in dims if isinstance(d, Axis) and len(d) == size > 1]
        if not axes:
            alone = UNIFORM in dims and all(n == 1 or d is UNIFORM for d, n in zip(dims, sizes, strict=True))
            return UNIFORM if alone else None
        if any(d is None and n > 1 for d, n in zip(dims, sizes, strict=True)):
            for axis in axes:
                self.pin(axis, FIXED_SIZE)
            return None
        if len(axes) > 1:  # a position that is pinned later must not fix a blank dimension as a whole
            axes.sort(key=lambda axis: self.store.is_blank(axis.atoms))
        for axis in axes[1:]:
            self.tie(axes[0].atoms, axis.atoms)
        known = np.array([d.zero if isinstance(d, Axis) and len(d) > 1 else np.zeros(size, bool) for d in dims])
        met = axes[0].with_zero(_flags(known, zero))
        if not met.zero.all() and known.any():  # known for the reason, if these are summed over
            self.store.lost.setdefault(int(met.atoms[~met.zero][0]), self._place(self.name))
        if met.zero.all() or not any(axis.fading for axis in axes):
            return met
        return self._supposed(met, [d.fading if isinstance(d, Axis) else frozenset() for d in dims], known, zero)

    def _supposed(
        self, met: Axis, fading: Sequence[frozenset[int]], known: Flags, zero: Callable[[Flags], bool]
    ) -> Axis:
        """Returns an axis that is not zero when dead, as it is once buffers have faded.

        The buffers fade if the operation has data among its inputs. Otherwise the axis keeps their ids, and so does a
        buffer that is written to.

        Args:
            met: The result of an elementwise operation.
            fading: The ids of the buffers that have to fade for each operand to be zero.
            known: Whether each operand is zero already, ``(operands, positions)``.
            zero: As in :meth:`meet`.
        """

        def suffices(operands: Sequence[int]) -> bool:
            faded = frozenset().union(*(fading[i] for i in operands))
            flags = known.copy()
            flags[[i for i, ids in enumerate(fading) if ids and ids <= faded]] = True
            return bool(_flags(flags, zero).all())

        self.supposes = True
        needed = [i for i, ids in enumerate(fading) if ids]
        needed.sort(key=lambda i: self.store.left_to_fade(fading[i]), reverse=True)
        enough = suffices(needed)
        if not enough:  # all of them together may divide by zero, where one of them does not
            needed = [i for i in reversed(needed) if suffices([i])][:1]
            enough = bool(needed)
        for i in needed.copy() if len(needed) > 1 else ():
            if suffices([other for other in needed if other != i]):
                needed.remove(i)
        self.supposes = False
        if not enough:
            return met
        ids = frozenset().union(*(fading[i] for i in needed))
        if self.stored or any(known is not None and known.stored for known in map(self._layout_of, self.outputs)):
            return Axis(met.atoms, met.zero, ids)
        self.store.fading |= ids
        return met.with_zero(True)

    def broadcast(self, operands: list[Dims], shapes: list[tuple[int, ...]], zero: Callable[[Flags], bool]) -> Dims:
        """Returns the dimensions of an elementwise result; the operands are aligned at their last dimensions."""
        rank = max(map(len, shapes))
        rows = [(None,) * (rank - len(dims)) + dims for dims in operands]
        sizes = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        columns = zip(zip(*rows, strict=True), zip(*sizes, strict=True), strict=True)
        return tuple(self.meet(dims, size, zero=zero) for dims, size in columns)

    def contract(self, one: Dim, other: Dim) -> None:
        """Ties two dimensions whose products are summed; pins channels whose products may be nonzero when dead."""
        if not isinstance(one, Axis) or not isinstance(other, Axis):
            if one is None or other is None:
                self.pin(one, FIXED_SIZE)
                self.pin(other, FIXED_SIZE)
            for dim in (one, other):
                self.sum_over(dim)
            return
        self.tie(one.atoms, other.atoms)
        self.sum_over(one.with_zero(one.zero | other.zero))

    def sum_over(self, dim: Dim, text: str | None = None) -> None:
        """Pins the channels along a summed dimension that are not known to be zero when they are dead."""
        if isinstance(dim, Axis) and not dim.zero.all():
            rest = dim[np.flatnonzero(~dim.zero)]
            if text is None:
                lost = self.store.lost.get(int(rest.atoms[0]))
                why = (
                    "it is not zero when dead" if lost is None else f"{lost} leaves it other than zero when it is dead"
                )
                text = f"sums over it, and {why}"
            self.pin_or_owe(rest, text)

    def add_bias(self, result: Dims, bias: Tensor | None, dim: int) -> Dims:
        """Returns the dimensions of a result after the addition of a bias ``(channels,)`` along dimension ``dim``."""
        if bias is None:
            return result
        size = bias.shape[0]
        joined = self.meet([result[dim], self.dims(bias)[0]], [size, size], zero=lambda known: bool(known.all()))
        return (*never_zero(result[:dim]), joined, *never_zero(result[dim + 1 :]))
