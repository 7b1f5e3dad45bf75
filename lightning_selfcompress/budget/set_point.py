"""The size that a network is to have in the course of its training."""

import math

BEGIN = 0.02  # share of the training at which the size begins to fall


EARLIEST, LATEST = 0.45, 0.75  # shares of the training at which it may have fallen


STEPS = 100.0  # that a size is given to fall by a factor of e; in a short training there are fewer


MARGIN = 0.06  # how far above the target, in log bytes, the size is then: it falls by itself while rates cool down


def fallen(steps: float, start: float, target: float) -> float:
    """Returns the share of a training at which the size has fallen: early, but no faster than a network can follow.

    >>> from lightning_selfcompress.budget.set_point import fallen
    >>> [fallen(steps, 2.7183e4, 1e4) for steps in (100, 200, 10_000)]
    [0.75, 0.5, 0.45]

    Args:
        steps: Steps of the whole training.
        start: Bytes at the start, > 0.
        target: Bytes at the end, > 0.
    """
    return round(min(LATEST, max(EARLIEST, STEPS * math.log(start / target) / steps)), 3)


def set_point(progress: float, start: float, target: float, end: float = EARLIEST) -> float:
    """Returns the size that is wanted now: it falls along a cosine in log bytes, then creeps up to the target.

    With u from 0 at :data:`BEGIN` to 1 at ``end``, and v from 0 there to 1 at the end of the training::

        log s = log low + (log start - log low) (1 + cos(pi u)) / 2,    log low = log target + MARGIN (1 - v)

    >>> from lightning_selfcompress.budget.set_point import set_point
    >>> [round(set_point(t, 1e6, 1e4)) for t in (0.0, 0.235, 0.45, 1.0)]
    [1000000, 103045, 10618, 10000]

    Args:
        progress: Share of the training that is done, from 0 to 1.
        start: Bytes at the start, > 0.
        target: Bytes at the end, > 0, at most ``start``.
        end: Share of the training at which the size has fallen.

    Returns:
        Bytes.
    """
    u = min(1.0, max(0.0, (progress - BEGIN) / (end - BEGIN)))
    v = min(1.0, max(0.0, (progress - end) / (1 - end)))
    high = math.log(start)
    low = min(high, math.log(target) + MARGIN * (1 - v))
    return math.exp(low + (high - low) * (1 + math.cos(math.pi * u)) / 2)
