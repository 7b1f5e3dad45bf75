"""The types of the callback's arguments, and their checks, made at once."""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

from lightning_selfcompress.budget.target import target_nbytes

Gamma = float | Callable[[int], float]
Price = (
    Literal["bits", "bytes", "operations"] | Callable[[nn.Module], Tensor]
)  # no str: YAML may give the path of a function


def check_goal(gamma: Any, target_size: Any, *, bits_lr: float, prune_every_n_epochs: int) -> None:
    """Checks that there is one goal, and that it can be reached.

    Raises:
        TypeError: If there is not exactly one of ``gamma`` and ``target_size``, or it is of another type.
        ValueError: If it is out of its range, or a size is to be reached without removal or with depths held.
    """
    if gamma is None and target_size is None:
        raise TypeError('Expected a goal: gamma=0.1, a loss per bit, or target_size="50KB", the bytes of the file.')
    if target_size is None:
        if not callable(gamma):
            check_gamma(gamma)
        return
    if gamma is not None:
        raise TypeError(f"Expected either gamma or target_size, got gamma={gamma!r} and target_size={target_size!r}.")
    target_nbytes(target_size, 1 << 62)
    if bits_lr == 0 or prune_every_n_epochs == 0:
        raise ValueError(
            f"Expected bits_lr > 0 and prune_every_n_epochs > 0 with target_size={target_size!r}, which is reached by "
            f"fewer bits and channels; got {bits_lr!r} and {prune_every_n_epochs!r}."
        )


def check_gamma(gamma: Any, origin: str = "") -> None:
    """Checks a price.

    Args:
        gamma: The price.
        origin: Where it comes from, for the message.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is below 0 or not finite.
    """
    if not is_number(gamma):
        raise TypeError(
            f"Expected gamma to be a number >= 0 (loss per bit of the average weight) or a function of the global "
            f"step, got {gamma!r}{origin}."
        )
    if not 0 <= gamma < math.inf:
        raise ValueError(f"Expected a finite gamma >= 0 (loss per bit of the average weight), got {gamma!r}{origin}.")


def gamma_at(gamma: Gamma | None, step: int) -> float:
    """Returns the gamma of a step, which a function of the user's may give.

    Raises:
        TypeError: If a function returns no number.
        ValueError: If a function returns a number that is below 0 or not finite.
    """
    assert gamma is not None
    if not callable(gamma):
        return float(gamma)
    value = gamma(step)
    check_gamma(value, f" from the function at step {step}")
    return float(value)


def check_numbers(*, initial_bits: Any, bits_lr: Any, cooldown: Any, prune_every_n_epochs: Any, round_to: Any) -> None:
    """Checks the callback's numbers.

    Raises:
        ValueError: If one is no number or out of its range.
    """
    if not is_number(initial_bits) or not 2 <= initial_bits <= 24:
        raise ValueError(f"Expected initial_bits from 2 to 24, got {initial_bits!r}.")
    if not is_number(bits_lr) or not 0 <= bits_lr < math.inf:
        raise ValueError(f"Expected bits_lr >= 0 (bits a step), got {bits_lr!r}.")
    if not is_number(cooldown) or not 0 <= cooldown <= 1:
        raise ValueError(f"Expected cooldown from 0 to 1 (a share of the training), got {cooldown!r}.")
    for name, value, least in (("prune_every_n_epochs", prune_every_n_epochs, 0), ("round_to", round_to, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"Expected {name} to be a whole number >= {least}, got {value!r}.")


def check_skip(skip: Iterable[Any]) -> None:
    """Checks what is to be left in float.

    Raises:
        TypeError: If an entry is neither a string nor a type.
    """
    for entry in skip:
        if not isinstance(entry, (str, type)):
            raise TypeError(f"Expected module names, patterns or nn.Module types in skip, got {entry!r}.")


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)
