"""The rate of codes: the entropy of two-sided geometric codes, in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.size.rate import code_rate, rate_slope, zero_rate

magnitudes = st.floats(1e-4, 1e3)


@given(magnitudes)
def test_is_the_entropy_of_two_sided_geometric_codes(m):
    """H(m) is the entropy of p(c) ~ theta^|c| with mean magnitude m, summed code by code."""
    theta = (math.sqrt(1 + m * m) - 1) / m
    zero = (1 - theta) / (1 + theta)
    terms, mean, p = [-zero * math.log2(zero)], 0.0, zero
    for c in range(1, 200_000):
        p *= theta
        if p < 1e-300:
            break
        terms.append(-2 * p * math.log2(p))
        mean += 2 * p * c
    assert mean == pytest.approx(m, rel=1e-6)
    assert code_rate(torch.tensor(m, dtype=torch.float64)).item() == pytest.approx(math.fsum(terms), rel=1e-6)


@given(magnitudes)
def test_slope_is_the_derivative(m):
    """The slope is what autograd derives from the rate, and a zero costs what is left of it: H - m dH/dm."""
    x = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    code_rate(x).backward()
    assert rate_slope(x.detach()).item() == pytest.approx(x.grad.item(), rel=1e-9)
    assert zero_rate(x.detach()).item() == pytest.approx((code_rate(x) - x * x.grad).item(), rel=1e-6, abs=1e-12)


def test_of_nothing():
    """A channel without codes costs nothing, and its slope is finite."""
    zero = torch.zeros(1)
    assert code_rate(zero).item() == pytest.approx(0, abs=1e-4)
    assert math.isfinite(rate_slope(zero).item())
