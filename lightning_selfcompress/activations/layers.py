"""Modules that quantize the activations they take or return: the same objects with another class."""

import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_selfcompress.activations.formula import q_a
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS
from lightning_selfcompress.quantize.layers import Quantized, applied_in_float
from lightning_selfcompress.quantize.quantized_class import can_become, quantized_class
from lightning_selfcompress.tensors import name_of

INPUT, OUTPUT = "input", "output"
EXPONENTS = "_activation_exponents"  # the buffer
KEYS = {INPUT: "activation_input", OUTPUT: "activation_output"}  # in state dicts


SHORT_KEYS = {INPUT: "qa_in", OUTPUT: "qa_out"}  # in packed files, where every character takes a byte


_LIMIT = 128 * EXPONENT_STEPS  # of exponents, in sixteenths


@dataclass(frozen=True)
class Point:
    """What a module quantizes, and how.

    Args:
        where: ``"input"``, the module's first argument, or ``"output"``, the tensor that it returns.
        signed: Whether codes are negative as well.
        bits: Bit depth.
    """

    where: str
    signed: bool
    bits: int

    def to_number(self, exponent: float) -> int:
        """Returns the point and its exponent, in sixteenths, as one whole number >= 0, as packed files hold it."""
        sixteenths = min(max(round(exponent * EXPONENT_STEPS), -_LIMIT), _LIMIT - 1) + _LIMIT
        return (sixteenths * 2 + self.signed) * 16 + self.bits

    @classmethod
    def from_number(cls, where: str, number: int) -> "tuple[Point, float]":
        """Undoes :meth:`to_number`."""
        sixteenths, rest = divmod(number, 32)
        return cls(where, rest >= 16, rest % 16), (sixteenths - _LIMIT) / EXPONENT_STEPS


class Activated(nn.Module):
    """The mixin of modules that quantize activations, whose classes :func:`activated_class` makes.

    The exponents are a buffer that state dicts hold as one entry for each point, ``activation_input`` and
    ``activation_output``: the exponent, whether codes are signed, and the bit depth.
    """

    _points: tuple[Point, ...]
    _base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own ``forward`` between the quantizers."""
        for number, point in enumerate(self._points):
            if point.where == INPUT:
                if args:
                    args = (self._quantized_activation(number, args[0]), *args[1:])
                else:
                    name = next(iter(kwargs))
                    kwargs = {**kwargs, name: self._quantized_activation(number, kwargs[name])}
        out = super().forward(*args, **kwargs)
        for number, point in enumerate(self._points):
            if point.where == OUTPUT:
                out = self._quantized_activation(number, out)
        return out

    def _quantized_activation(self, number: int, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if _of_thread.quantizer is not None:
            return _of_thread.quantizer(self, number, x)
        point, exponents = self._points[number], cast(Tensor, self._buffers[EXPONENTS])
        if not x.requires_grad:  # data: to learn its step, the first layer would have to compute gradients of its input
            exponents = exponents.detach()
        return q_a(x, exponents[number], point.bits, point.signed)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves or casts the module; exponents keep their identity, and a dtype of at least 32 bits."""
        exponents = self._buffers.pop(EXPONENTS)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers[EXPONENTS] = applied_in_float(fn, cast(Tensor, exponents))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for point, exponent in zip(self._points, cast(Tensor, self._buffers[EXPONENTS]).detach(), strict=True):
            rest = exponent.new_tensor([float(point.signed), float(point.bits)])
            destination[prefix + KEYS[point.where]] = torch.cat([exponent.view(1), rest])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        keys = {prefix + KEYS[point.where]: number for number, point in enumerate(self._points)}
        unexpected_keys.extend(key for key in unexpected if key not in keys)
        for key, number in keys.items():
            if key in state_dict:
                with torch.no_grad():
                    cast(Tensor, self._buffers[EXPONENTS])[number] = state_dict[key][0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10 has none unless a base class defines it
        state = dict(inherited() if inherited is not None else self.__dict__)
        return _rebuild, (self._base,), state


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made = activated_class(base)
    return made.__new__(made)


def activated_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of a module that quantizes activations, a subclass of :class:`Activated` and ``base``.

    Raises:
        TypeError: If an object of ``base`` cannot change to such a class.
    """
    if base not in _CLASSES:
        body: dict[str, Any] = {"_base": base, "__module__": Activated.__module__, "__doc__": base.__doc__}
        body["_made_by"] = (activated_class, (base,))
        made = types.new_class(base.__name__, (Activated, base), {}, lambda own: own.update(body))
        if not can_become(base, made):
            raise TypeError(f"an object of {base.__name__} cannot change to a class derived from it")
        _CLASSES[base] = made
    return _CLASSES[base]


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module has, or would have, without quantized activations."""
    return module._base if isinstance(module, Activated) else type(module)


def set_points(module: nn.Module, points: Sequence[Point], exponents: Sequence[float]) -> None:
    """Has a module quantize activations at these points, and at no others; without any it becomes what it was.

    Args:
        module: Any module, quantized or not.
        points: The points, at most one of each kind.
        exponents: The exponent of each point.

    Raises:
        TypeError: If the module cannot change its class.
    """
    kind = module._float_class if isinstance(module, Quantized) else type(module)
    base = kind._base if issubclass(kind, Activated) else kind
    wanted = activated_class(base) if points else base
    kept = module._buffers.pop(EXPONENTS, None)
    module._non_persistent_buffers_set.discard(EXPONENTS)
    module.__dict__.pop("_points", None)
    if points:
        near = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        dtype = torch.float32 if near is None else torch.promote_types(near.dtype, torch.float32)
        values = torch.tensor([float(e) for e in exponents], dtype=dtype, device=None if near is None else near.device)
        if kept is not None:
            values = values.to(kept)
        nn.Module.register_buffer(module, EXPONENTS, values, persistent=False)
        module.__dict__["_points"] = tuple(points)
    if isinstance(module, Quantized):
        wanted = quantized_class(wanted, tuple(module._quantized))
    object.__setattr__(module, "__class__", wanted)


def activated_modules(model: nn.Module) -> "Iterator[tuple[str, Activated]]":
    """Yields the paths and modules of a model that quantize activations."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Activated))


def exponents_of(module: Activated) -> Tensor:
    """Returns the exponents of a module's points, ``(points,)``, the buffer that is learned."""
    return cast(Tensor, module._buffers[EXPONENTS])


def remove_activations(model: nn.Module) -> nn.Module:
    """Has a model quantize no activations any more, in place; returns it.

    >>> import torch
    >>> from lightning_selfcompress import calibrate_activations
    >>> from lightning_selfcompress.activations import remove_activations
    >>> net = calibrate_activations(torch.nn.Sequential(torch.nn.Linear(4, 2)), [torch.randn(8, 4)])
    >>> list(remove_activations(net).state_dict())
    ['0.weight', '0.bias']

    Args:
        model: Any module.
    """
    for _, module in list(activated_modules(model)):
        set_points(module, (), ())
    return model


def saved_points(values: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, tuple[Point, float]]]:
    """Returns the points in a state dict or in the numbers of a packed file: path of a module -> place -> point.

    Args:
        values: Values by their names.
        prefix: What the names of the module begin with.
    """
    found: dict[str, dict[str, tuple[Point, float]]] = {}
    for name, value in values.items():
        path, _, last = name.removeprefix(prefix).rpartition(".")
        for where in (INPUT, OUTPUT) if name.startswith(prefix) else ():
            if last == SHORT_KEYS[where] and isinstance(value, int):
                found.setdefault(path, {})[where] = Point.from_number(where, value)
            elif last == KEYS[where] and isinstance(value, Tensor) and value.shape == (3,):
                exponent, signed, bits = (float(v) for v in value)
                found.setdefault(path, {})[where] = Point(where, signed >= 0.5, round(bits)), exponent
    return found


def take_points(model: nn.Module, values: Mapping[str, Any], prefix: str = "") -> None:
    """Has the modules of a model quantize activations as a state dict or the numbers of a packed file say.

    Args:
        model: A model.
        values: Values by their names; without any point nothing is changed.
        prefix: What the names of the model begin with.
    """
    modules = dict(model.named_modules())
    for path, places in saved_points(values, prefix).items():
        module = modules.get(path)
        points, exponents = zip(*places.values(), strict=True)
        if module is not None and tuple(points) != getattr(module, "_points", ()):
            set_points(module, points, exponents)


def point_numbers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields the names and numbers by which a packed file holds the points of a model."""
    for path, module in activated_modules(model):
        for point, exponent in zip(module._points, exponents_of(module).tolist(), strict=True):
            yield name_of(path, SHORT_KEYS[point.where]), point.to_number(exponent)


class _OfThread(threading.local):
    quantizer: Callable[[Activated, int, Tensor], Tensor] | None = None  # set by quantizing_through


_of_thread = _OfThread()


@contextmanager
def quantizing_through(quantizer: Callable[[Activated, int, Tensor], Tensor]) -> Iterator[None]:
    """Lets ``quantizer(module, number of the point, x)`` compute what this thread quantizes within this context."""
    earlier, _of_thread.quantizer = _of_thread.quantizer, quantizer
    try:
        yield
    finally:
        _of_thread.quantizer = earlier


def activations_off() -> AbstractContextManager[None]:
    """Within this context networks compute with their activations as they are, in this thread."""
    return quantizing_through(lambda _module, _number, x: x)
