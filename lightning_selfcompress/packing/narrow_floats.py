"""float32 tensors in one byte per value, where all values are multiples of a power of two, or powers of a step."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_selfcompress.packing.structure import EXPONENT_LIMIT
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, step_size

Numbers = NDArray[Any]


LARGEST = 127  # the largest magnitude of a scaled value


LEAST_SCALE, MOST_SCALE = -155, 121  # exponents of two: 64 times the first is the smallest float32 number


RANGE = 256  # number of different logarithmic values


SAMPLE = 64  # values that are looked at before all values are


def scaled_int8(
    values: Tensor,  # float32
) -> tuple[int, Numbers] | None:
    """Returns the scale s and the integers k, int8, of a tensor of the values ``k * 2^s``; None if there are none.

    The scale is the smallest at which the largest magnitude is at most 127, and 0 if all values are 0. Negative zeros,
    infinities and NaN cannot be stored.
    """
    flat = values.detach().reshape(-1).numpy()
    for some in (flat[:SAMPLE], flat):
        if not np.isfinite(some).all() or (np.signbit(some) & (some == 0)).any():
            return None
        scale = _scale(some)
        exact = np.ldexp(some.astype(np.float64), -scale)
        if (exact != np.rint(exact)).any() or (np.abs(exact) > LARGEST).any():
            return None
    return scale, exact.astype(np.int8)


def from_scaled_int8(scale: int, integers: Numbers) -> Tensor:
    """Undoes :func:`scaled_int8`; the result is flat."""
    return torch.from_numpy(np.ldexp(integers.astype(np.float64), scale).astype(np.float32))


def logarithmic(
    values: Tensor,  # float32
) -> tuple[int, Numbers] | None:
    """Returns the first exponent and the numbers k, uint8, of a tensor of the values ``2^((first + k) / 16)``.

    The values are those of :func:`~lightning_selfcompress.quantize.formula.step_size`, in float32. The first exponent
    is the smallest of the tensor, in sixteenths. The result is None for a tensor of other values.
    """
    flat = values.detach().reshape(-1)
    for some in (flat[:SAMPLE], flat):
        if not some.numel() or not bool(((some > 0) & some.isfinite()).all()):
            return None
        exponents = _sixteenths(some)
        first = int(exponents.min())
        if int(exponents.max()) - first >= RANGE or not torch.equal(_powers(exponents), some):
            return None
    return first, (exponents - first).numpy().astype(np.uint8)


def from_logarithmic(first: int, numbers: Numbers) -> Tensor:
    """Undoes :func:`logarithmic`; the result is flat."""
    return _powers(torch.from_numpy(numbers.astype(np.int64)) + first)


def is_vector(values: Tensor) -> bool:
    """Returns whether a tensor is a float32 vector of several values, as biases and statistics are."""
    return values.dtype == torch.float32 and 4 <= values.numel() == max(values.shape, default=0)


def rounded(values: Tensor) -> Tensor:
    """Returns the nearest tensor that a packed file holds in one byte per value.

    The result is ``k * 2^s`` with whole numbers k from -127 to 127, and then differs from the values by at most
    ``max|x| / 127``. If all values are positive, the result may instead be powers of ``2^(1/16)``, which differ by at
    most 2.2% from the values within a range of ``2^15.9`` below the largest. Of both results, that of the smaller
    squared relative error is returned, where no value counts more than as if it were lost.

    >>> import torch
    >>> from lightning_selfcompress.packing import rounded
    >>> rounded(torch.tensor([1.0, -0.504, 0.0]))
    tensor([ 1.0000, -0.5000,  0.0000])

    Args:
        values: Any shape, float32. Tensors of other dtypes, empty tensors, and tensors that hold infinity or NaN are
            returned unchanged.

    Returns:
        Values of the same shape, dtype and device.
    """
    if values.dtype != torch.float32 or not values.numel() or not bool(values.isfinite().all()):
        return values
    wide = values.detach().cpu().double().reshape(-1)
    scale = _scale(wide.numpy())
    integers = np.rint(np.ldexp(wide.numpy(), -scale)).clip(-LARGEST, LARGEST)
    best = from_scaled_int8(scale, integers.astype(np.int8))
    if bool((wide > 0).all()):
        exponents = _sixteenths(wide)
        powers = _powers(exponents.clamp_min(int(exponents.max()) - RANGE + 1))
        if _relative_error(powers, wide) < _relative_error(best, wide):
            best = powers
    return best.reshape(values.shape).to(values.device)


def _scale(flat: Numbers) -> int:
    """Returns the smallest exponent of two at which all values round to integers from -127 to 127; 0 for zeros."""
    largest = float(np.abs(flat).max(initial=0))
    if not largest:
        return 0
    fraction, exponent = math.frexp(largest)
    return min(exponent - 7 if round(128 * fraction) <= LARGEST else exponent - 6, MOST_SCALE)


def _sixteenths(positive: Tensor) -> Tensor:
    limits = -EXPONENT_LIMIT, EXPONENT_LIMIT - 1
    return (positive.double().log2() * EXPONENT_STEPS).round().long().clamp(*limits)


def _powers(exponents: Tensor) -> Tensor:
    """Returns the float32 steps of exponents in sixteenths."""
    return step_size(exponents.double() / EXPONENT_STEPS).float()


def _relative_error(found: Tensor, values: Tensor) -> float:
    """Returns the sum of squared relative errors, each at most 1: what is far below all others does not decide."""
    return float(((found.double() - values) / values).square().clamp(max=1).sum())
