"""The layer types that can be quantized, with the names and output-channel axes of their weights."""

from collections.abc import Callable, Mapping
from typing import cast
from weakref import WeakKeyDictionary

from torch import nn

from lightning_selfcompress.quantize.channel_axis import ChannelAxis


def _rows(*names: str) -> Callable[[nn.Module], dict[str, ChannelAxis]]:
    # The layer does not use a weight that is registered as None. A hook has removed a weight that is not registered:
    # the weight is listed here, and the plan reports it as an obstacle.
    return lambda layer: {n: ChannelAxis() for n in names if layer._parameters.get(n, layer) is not None}


def _columns(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1)}


def _transposed(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1, groups=cast(int, layer.groups))}


def _recurrent(layer: nn.Module) -> dict[str, ChannelAxis]:
    names = cast("list[str]", layer._flat_weights_names)
    return {n: ChannelAxis() for n in names if n.startswith("weight_")}


# Layer type -> the names and channel axes of its weights. Subclasses count as well, and keep their own forward.
REGISTRY: dict[type[nn.Module], Callable[[nn.Module], dict[str, ChannelAxis]]] = {
    nn.Linear: _rows("weight"),
    nn.Conv1d: _rows("weight"),
    nn.Conv2d: _rows("weight"),
    nn.Conv3d: _rows("weight"),
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.Embedding: _columns,
    nn.EmbeddingBag: _columns,
    nn.Bilinear: _rows("weight"),
    nn.MultiheadAttention: _rows("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.LSTMCell: _rows("weight_ih", "weight_hh"),
    nn.GRUCell: _rows("weight_ih", "weight_hh"),
    nn.RNNCell: _rows("weight_ih", "weight_hh"),
}


# Layer type -> the names and channel axes that :func:`register_layer` was told. A class that is gone leaves no entry.
_TOLD: WeakKeyDictionary[type[nn.Module], dict[str, ChannelAxis]] = WeakKeyDictionary()


def register_layer(
    layer_class: type[nn.Module],
    axes: Mapping[str, ChannelAxis | int] | None = None,
    /,
    **named_axes: ChannelAxis | int,
) -> None:
    """Tells where the output channels of a layer class's weights lie, so that its layers are quantized.

    Layers of torch and their subclasses are known, and most others are found by what they do in the first training
    step. This is for the rest, and for a network that is converted without a Trainer. It counts for subclasses as well,
    and for what is converted from now on. Call it where the class is defined: whatever imports the class, a YAML file
    of LightningCLI for example, then registers it.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import ChannelAxis, convert, register_layer
    >>> class Columns(nn.Module):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
    ...     def forward(self, x):
    ...         return x @ self.weight
    >>> register_layer(Columns, weight=ChannelAxis(dim=1))
    >>> print(convert(nn.Sequential(Columns(4, 3))))
    Compressed: 12 weights in 1 layers (1 Columns)

    Args:
        layer_class: A subclass of ``nn.Module``.
        axes: Name of a parameter -> its axis, for names that are no Python names.
        named_axes: The axes of the other parameters, by their names. A number stands for ``ChannelAxis(number)``.

    Raises:
        TypeError: If ``layer_class`` is no module class, or an axis is neither a :class:`ChannelAxis` nor a number.
        ValueError: If no parameter is named, an axis is negative, or the class was registered otherwise before.
            Whether the parameters exist and have the dimensions is known when a layer is converted.
    """
    if not isinstance(layer_class, type) or not issubclass(layer_class, nn.Module):
        raise TypeError(f"Expected a subclass of nn.Module in register_layer, got {layer_class!r}.")
    given = {**(axes or {}), **named_axes}
    name = layer_class.__qualname__
    if not given:
        raise ValueError(
            f"Expected register_layer({name}, ...) to name parameters, got none. Write the axis of each, for example "
            f"register_layer({name}, weight=ChannelAxis(dim=1))."
        )
    told = {parameter: _checked(name, parameter, axis) for parameter, axis in given.items()}
    if _TOLD.setdefault(layer_class, told) != told:
        raise ValueError(
            f"Expected one registration of {name}, got two that disagree: {_said(_TOLD[layer_class])}, and now "
            f"{_said(told)}."
        )


def _checked(class_name: str, parameter: str, axis: ChannelAxis | int) -> ChannelAxis:
    if not isinstance(axis, ChannelAxis | int) or isinstance(axis, bool):
        raise TypeError(
            f"Expected a ChannelAxis or the number of a dimension in register_layer({class_name}, {parameter}=...), "
            f"got {axis!r}."
        )
    axis = axis if isinstance(axis, ChannelAxis) else ChannelAxis(axis)
    if axis.dim < 0 or axis.groups < 1:
        raise ValueError(
            f"Expected a dimension from 0 and at least one group in register_layer({class_name}, {parameter}=...), got "
            f"{axis}."
        )
    return axis


def _said(axes: Mapping[str, ChannelAxis]) -> str:
    return ", ".join(f"{name}={axis}" for name, axis in axes.items())


def known_axes(layer: nn.Module) -> dict[str, ChannelAxis]:
    """Returns the names and channel axes of a float layer's weights, by its type; none if the type is not known.

    The most derived class that says something of a parameter counts; of one class, what :func:`register_layer` was
    told counts.

    Raises:
        ValueError: If a registered parameter is not there, or has other dimensions.
    """
    found: dict[str, ChannelAxis] = {}
    for kind in type(layer).__mro__:
        for name, axis in _TOLD.get(kind, {}).items():
            if name not in found and layer._parameters.get(name, layer) is not None:
                _check_there(layer, kind, name, axis)
                found[name] = axis
        if kind in REGISTRY:
            found = {**REGISTRY[kind](layer), **found}
    return found


def is_known(layer: nn.Module) -> bool:
    """Returns whether the type of a layer, or one of its bases, is known."""
    return any(kind in REGISTRY or kind in _TOLD for kind in type(layer).__mro__)


def is_registered(layer: nn.Module) -> bool:
    """Returns whether :func:`register_layer` was told of the type of a layer, or of one of its bases."""
    return any(kind in _TOLD for kind in type(layer).__mro__)


def is_told_by_torch(layer: nn.Module, name: str) -> bool:
    """Returns whether torch's own layer types tell the axis of a float layer's weight, so that no file has to."""
    if any(name in _TOLD.get(kind, ()) for kind in type(layer).__mro__):
        return False
    return any(kind in REGISTRY and name in REGISTRY[kind](layer) for kind in type(layer).__mro__)


def _check_there(layer: nn.Module, kind: type[nn.Module], name: str, axis: ChannelAxis) -> None:
    parameter = layer._parameters.get(name)
    if parameter is None:
        if not hasattr(layer, name):
            own = ", ".join(map(repr, layer._parameters)) or "none"
            raise ValueError(
                f"Expected a parameter {name!r} in each {kind.__qualname__}, as register_layer says, got a "
                f"{type(layer).__qualname__} whose parameters are: {own}."
            )
    elif not nn.parameter.is_lazy(parameter):
        check_axis(parameter, axis, f"register_layer({kind.__qualname__}, {name}=...)")


def check_axis(parameter: nn.Parameter, axis: ChannelAxis, said: str) -> None:
    """Checks that a parameter has the dimensions of a channel axis.

    Args:
        parameter: The parameter.
        axis: The axis.
        said: Where the axis was told, for the message.

    Raises:
        ValueError: If it has not.
    """
    if not axis.fits(parameter):
        raise ValueError(
            f"Expected {said} to give one of at least two dimensions, and groups (if any) that divide dimension 0 and "
            f"have their channels along another one, got {axis} for a parameter of shape {tuple(parameter.shape)}."
        )


def supported_types() -> str:
    """Returns the names of torch's layer types that can be quantized, for messages."""
    return ", ".join(t.__name__ for t in REGISTRY)
