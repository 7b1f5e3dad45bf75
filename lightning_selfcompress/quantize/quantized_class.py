"""The classes of quantized layers, each made of :class:`Quantized` and a float class."""

import types
from typing import Any, cast

from torch import nn

from lightning_selfcompress.quantize.layers import Quantized, _QuantizedRNN, read_weight

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[Quantized]] = {}


def _rebuild(float_class: Any, names: tuple[str, ...]) -> nn.Module:
    if isinstance(float_class, tuple):
        make, arguments = float_class
        float_class = make(*arguments)
    made = quantized_class(float_class, names)
    return made.__new__(made)


def quantized_class(float_class: type[nn.Module], names: tuple[str, ...]) -> type[Quantized]:
    """Returns the class ``Quantized<float_class>``, with a property for each weight in ``names``.

    Args:
        float_class: Class of the layer to be quantized.
        names: Names of the layer's weight parameters.

    Returns:
        A subclass of :class:`Quantized` and ``float_class``, the same class at every call.

    Raises:
        Exception: If no class can be derived from ``float_class``; its own code may raise anything then.
    """
    if (float_class, names) in _CLASSES:
        return _CLASSES[float_class, names]

    def weight_property(name: str) -> property:
        return property(lambda self: read_weight(self, name), doc=f"Quantized {name}: q(latent, b, e).")

    mixin = _QuantizedRNN if issubclass(float_class, nn.RNNBase) else Quantized
    body: dict[str, Any] = {name: weight_property(name) for name in names}
    body |= {"_float_class": float_class, "_rebuild": staticmethod(_rebuild), "__module__": Quantized.__module__}
    body["__doc__"] = f"{float_class.__name__}, quantized."
    name = f"Quantized{float_class.__name__}"
    made = types.new_class(name, (mixin, float_class), {}, lambda own: own.update(body))
    if not can_become(float_class, made):
        made = _of_float_class_first(mixin, float_class, body)
        if not can_become(float_class, made):
            raise TypeError(f"an object of {float_class.__name__} cannot change to a class derived from it")
    return _CLASSES.setdefault((float_class, names), cast("type[Quantized]", made))


def can_become(float_class: type[nn.Module], made: type) -> bool:
    """Returns whether Python lets an object change from one class to another."""
    probe = object.__new__(float_class)
    try:
        object.__setattr__(probe, "__class__", made)
    except TypeError:
        return False
    return True


def _of_float_class_first(mixin: type[Quantized], float_class: type[nn.Module], body: dict[str, Any]) -> type:
    """Makes the class with the layout of a float class whose first base is not a module, such as ``ABC``.

    An object may only change to a class whose first base has its layout. So the float class comes first among the bases
    here, and the methods of the mixin, which have to come before its own, are copied into the class.
    """
    copied: dict[str, Any] = {}
    itself = types.CellType()
    for kind in (Quantized, mixin):
        for name, value in vars(kind).items():
            if isinstance(value, types.FunctionType):
                free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
                cells = tuple(itself if variable == "__class__" else cell for variable, cell in free)
                value = types.FunctionType(value.__code__, value.__globals__, name, value.__defaults__, cells)
            if not name.startswith("__") or isinstance(value, types.FunctionType):
                copied[name] = value
    itself.cell_contents = made = types.new_class(
        f"Quantized{float_class.__name__}", (float_class, mixin), {}, lambda own: own.update({**copied, **body})
    )
    return made
