"""The points that no other beats in both metric and bytes."""

from itertools import pairwise
from math import nan

from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.reporting.front import Point, beats, front

POINTS = st.lists(st.builds(Point, st.sampled_from([0.1, 0.5, 0.9, nan]), st.integers(1, 5), st.integers(0, 9)))
MODES = st.sampled_from(["min", "max"])


@given(POINTS, MODES)
def test_front_is_what_nothing_beats(points, mode):
    """Nothing beats a point of the front, and something of it beats, or equals, every other point."""
    kept = front(points, mode)
    assert not any(beats(other, point, mode) for other in points for point in kept)
    for point in points:
        as_good = any((k.metric, k.nbytes) == (point.metric, point.nbytes) for k in kept)
        assert as_good or any(beats(k, point, mode) for k in kept) or not any(p.metric == p.metric for p in points)


@given(POINTS, MODES)
def test_front_rises(points, mode):
    """From the fewest bytes to the most the metric becomes better at every point."""
    kept = front(points, mode)
    sign = 1 if mode == "max" else -1
    assert all(a.nbytes < b.nbytes and sign * a.metric < sign * b.metric for a, b in pairwise(kept))


def test_of_equal_points_the_first_stays():
    """A later network that is as good in both replaces nothing."""
    assert front([Point(0.9, 10, 1, "a"), Point(0.9, 10, 2, "b")], "max") == (Point(0.9, 10, 1, "a"),)


def test_a_metric_that_is_no_number_is_beaten():
    """A network that diverged is on no front, however small it is."""
    assert front([Point(nan, 1)], "min") == ()
    assert beats(Point(0.1, 9), Point(nan, 1), "max")
