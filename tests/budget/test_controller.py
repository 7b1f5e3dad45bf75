"""The controller of gamma and its set point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.budget.controller import FASTEST, Controller
from lightning_selfcompress.budget.set_point import BEGIN, EARLIEST, MARGIN, set_point


@given(st.floats(0, 1), st.floats(0, 1), st.floats(10, 1e9), st.floats(0.001, 1))
def test_the_set_point_falls(early, late, start, share):
    """The set point never rises, begins at the size at hand and ends at the target."""
    early, late = sorted((early, late))
    target = start * share
    assert set_point(late, start, target) <= set_point(early, start, target) * (1 + 1e-9)
    assert set_point(BEGIN, start, target) == pytest.approx(start)
    assert set_point(1.0, start, target) == pytest.approx(target)
    assert target <= set_point(EARLIEST, start, target) * (1 + 1e-9) <= target * math.exp(MARGIN) * (1 + 2e-9)


def run(gain, lag, start, target, steps=4000):
    """A size that follows log gamma with a lag, ``log size = log start - gain * max(0, log gamma + 4)``, steered."""
    controller, size, seen = Controller(), math.log(start), []
    for step in range(5, steps + 1, 5):
        settled = math.log(start) - gain * max(0.0, controller.log_gamma + 4)
        size += (settled - size) * (1 - math.exp(-5 / lag))
        controller.update(5, size - math.log(set_point(step / steps, start, target)))
        seen.append(math.exp(size))
    return seen


@pytest.mark.parametrize("gain", [0.3, 0.6, 1.2])
@pytest.mark.parametrize("lag", [30.0, 100.0, 250.0])
@pytest.mark.parametrize("share", [0.3, 0.03])
def test_a_size_that_follows_with_a_lag_is_held(gain, lag, share):
    """Whatever gain and lag a network has, the size stays within 3% of the set point in the last quarter."""
    seen = run(gain, lag, 1e6, 1e6 * share)
    wanted = [set_point(step / 4000, 1e6, 1e6 * share) for step in range(5, 4001, 5)]
    assert all(abs(math.log(size / point)) < 0.03 for size, point in zip(seen[-200:], wanted[-200:], strict=True))


def test_gamma_changes_slowly():
    """However large an error, gamma has a limit on its slew."""
    controller = Controller()
    for error in (5.0, 5.0, -5.0):
        before = controller.log_gamma
        controller.update(10, error)
        assert abs(controller.log_gamma - before) <= 10 * FASTEST + 1e-9


def test_a_saturated_integral_waits():
    """After a long time at a limit, gamma turns as soon as the error does."""
    controller = Controller()
    for _ in range(2000):
        controller.update(10, 1.0)
    top = controller.gamma
    for _ in range(10):
        controller.update(10, -0.3)
    assert controller.gamma < top / 100


def test_goes_on_from_its_state():
    """A controller made of another one's numbers goes on as that one."""
    one = Controller()
    for error in (0.5, 0.2, -0.1):
        one.update(10, error)
    other = Controller(**vars(one))
    one.update(10, 0.3)
    other.update(10, 0.3)
    assert one == other
