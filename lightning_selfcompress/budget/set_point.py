"""The size that a network is to have in the course of its training."""

import math

BEGIN, END = 0.02, 0.45  # shares of the training between which the size falls


MARGIN = (
    0.06  # how far above the target, in log bytes, the size still is then: it falls by itself while rates cool down
)


def set_point(progress: float, start: float, target: float) -> float:
    """Returns the size that is wanted now: it falls along a cosine in log bytes, then creeps up to the target.

    With u from 0 at :data:`BEGIN` to 1 at :data:`END`, and v from 0 there to 1 at the end of the training::

        log s = log end + (log start - log end) (1 + cos(pi u)) / 2,    log end = log target + MARGIN (1 - v)

    >>> from lightning_selfcompress.budget.set_point import set_point
    >>> [round(set_point(t, 1e6, 1e4)) for t in (0.0, 0.235, 0.45, 1.0)]
    [1000000, 103045, 10618, 10000]

    Args:
        progress: Share of the training that is done, from 0 to 1.
        start: Bytes at the start, > 0.
        target: Bytes at the end, > 0, at most ``start``.

    Returns:
        Bytes.
    """
    u = min(1.0, max(0.0, (progress - BEGIN) / (END - BEGIN)))
    v = min(1.0, max(0.0, (progress - END) / (1 - END)))
    high = math.log(start)
    end = min(high, math.log(target) + MARGIN * (1 - v))
    return math.exp(end + (high - end) * (1 + math.cos(math.pi * u)) / 2)
