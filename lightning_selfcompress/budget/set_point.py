"""The size that a network is to have in the course of its training."""

import math

BEGIN, END = 0.02, 0.7  # shares of the training


def set_point(progress: float, start: float, target: float) -> float:
    """Returns the size that is wanted now: it falls along a cosine in log bytes, then stays at the target.

    ``log s(t) = log target + (log start - log target) * (1 + cos(pi u)) / 2`` with u from 0 at :data:`BEGIN` to 1 at
    :data:`END`.

    >>> from lightning_selfcompress.budget.set_point import set_point
    >>> [round(set_point(t, 1e6, 1e4)) for t in (0.0, 0.35, 0.6, 1.0)]
    [1000000, 100000, 10000, 10000]

    Args:
        progress: Share of the training that is done, from 0 to 1.
        start: Bytes at the start, > 0.
        target: Bytes at the end, > 0.

    Returns:
        Bytes; never above ``start`` or the target, whichever is larger.
    """
    u = min(1.0, max(0.0, (progress - BEGIN) / (END - BEGIN)))
    share = (1 + math.cos(math.pi * u)) / 2
    return math.exp(math.log(target) + (math.log(start) - math.log(target)) * share)
