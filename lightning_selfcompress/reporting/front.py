"""The front of a metric against bytes: the points that no other point beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Point:
    """A network by its metric and its bytes.

    Args:
        metric: The metric, for example an accuracy.
        nbytes: Bytes of the packed file.
        step: Steps of the optimizer so far.
        name: The file that holds the network, or the run that ended with it.
    """

    metric: float
    nbytes: int
    step: int = 0
    name: str = ""


def beats(a: Point, b: Point, mode: Mode) -> bool:
    """Returns whether a point is at least as good as another in metric and bytes, and better in one of them.

    Args:
        a: The point.
        b: The other point. A metric that is no number is beaten by every number.
        mode: Whether a good metric is a large one, ``"max"``, or a small one, ``"min"``.
    """
    if isnan(a.metric) or isnan(b.metric):
        return isnan(b.metric) and not isnan(a.metric)
    gain = a.metric - b.metric if mode == "max" else b.metric - a.metric
    return gain >= 0 and a.nbytes <= b.nbytes and (gain > 0 or a.nbytes < b.nbytes)


def front(points: Sequence[Point], mode: Mode) -> tuple[Point, ...]:
    """Returns the points that no other beats, from the fewest bytes to the most.

    Of points that are equal in both, the first stays; a point whose metric is no number never does.

    >>> from lightning_selfcompress.reporting.front import Point, front
    >>> points = [Point(0.90, 500), Point(0.95, 900), Point(0.93, 950), Point(0.90, 700)]
    >>> [(p.metric, p.nbytes) for p in front(points, "max")]
    [(0.9, 500), (0.95, 900)]

    Args:
        points: The points, in the order in which they were found.
        mode: Whether a good metric is a large one, ``"max"``, or a small one, ``"min"``.
    """
    kept: list[Point] = []
    sign = -1 if mode == "max" else 1
    for point in sorted((p for p in points if not isnan(p.metric)), key=lambda p: (p.nbytes, sign * p.metric)):
        if not kept or sign * point.metric < sign * kept[-1].metric:
            kept.append(point)
    return tuple(kept)
