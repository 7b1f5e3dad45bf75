"""Rules of operations that make new tensors, filled with one number or with random numbers."""

from lightning_selfcompress.channels.atoms import UNIFORM, Axis
from lightning_selfcompress.channels.call import Call, Result, Rule
from lightning_selfcompress.channels.layout import never_zero

_NOUGHT_AT_FIRST = ("zeros", "empty")  # what was never written to is never read


def new(call: Call) -> Result:
    """Handles ``zeros``, ``new_full`` and the like: the new tensor fits any channels.

    It is zero where dead channels will be as long as nothing else is written to it, if it is filled with zero or if it
    is empty.
    """
    call.is_new = True
    value = call.get("fill_value")
    zero = value == 0 if value is not None else any(word in call.name for word in _NOUGHT_AT_FIRST)
    call.makes_nought = zero and call.outputs[0].numel() == 1
    return [call.blank(call.shape, zero=zero)]


def number(call: Call) -> Result:
    """Handles ``scalar_tensor`` and ``lift_fresh``, by which a number of the program becomes a tensor."""
    call.is_new = call.name == "scalar_tensor"
    tensor = call.outputs[0]
    call.makes_nought = tensor.numel() == 1 and tensor.device.type == "cpu" and not bool(tensor.any())
    return [call.dims(tensor)]


def random(call: Call) -> Result:
    """Handles ``randn`` and the like: the new tensor fits any channels, and is never zero."""
    if call.inputs:
        return random_like(call)
    return [call.blank(call.shape, zero=False)]


def random_like(call: Call) -> Result:
    """Handles random or constant values in the shape of inputs: the same channels, none zero when it is dead."""
    operands = call.inputs
    dims = call.broadcast([call.dims(t) for t in operands], [tuple(t.shape) for t in operands], lambda _: False)
    if call.name == "bernoulli_" and len(dims) > 2 and max(call.shape[2:]) == 1 and not any(dims):
        return [(dims[0], UNIFORM, *dims[2:])]  # Dropout2d draws noise of a given shape, which fits any channel
    return [dims]


def zeros_like(call: Call) -> Result:
    """Handles zeros in the shape of a tensor."""
    return [tuple(d.with_zero(True) if isinstance(d, Axis) else d for d in call.dims(call.inputs[0]))]


def dropout(call: Call) -> Result:
    """Handles ``native_dropout`` and ``rrelu_with_noise``, which draw random numbers and keep zeros."""
    dims = call.dims(call.inputs[0])
    return [dims, *[never_zero(dims)] * (len(call.outputs) - 1)]


_NEW = ("zeros", "ones", "full", "empty", "empty_strided", "empty_permuted")


_NEW_OF = ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")


_NUMBER = ("scalar_tensor", "lift_fresh")


_RANDOM = ("rand", "randn", "randint", "normal")


# the rules of these operations also apply to tensors without known channels
MAKING = frozenset((*_NEW, *_NEW_OF, *_NUMBER, *_RANDOM))


RULES: dict[str, Rule] = {
    "native_dropout": dropout,
    "rrelu_with_noise": dropout,
    "zeros_like": zeros_like,
    **dict.fromkeys((*_NEW, *_NEW_OF), new),
    **dict.fromkeys(_NUMBER, number),
    **dict.fromkeys(_RANDOM, random),
    **dict.fromkeys(("empty_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"), random_like),
    **dict.fromkeys(("bernoulli", "bernoulli_", "uniform", "exponential", "random"), random_like),
    **dict.fromkeys(("geometric", "log_normal", "cauchy"), random_like),
}
