"""The rate of codes: the entropy of two-sided geometric codes, in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.size.rate import code_rate, counted_rate, rate_slope, zero_rate

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


@given(st.floats(0.01, 50))
def test_zeros_counted_apart(m):
    """For two-sided geometric codes both rates agree; more zeros than their share make codes cheaper."""
    theta = (math.sqrt(1 + m * m) - 1) / m
    n, nonzero = 1000.0, 1000.0 * 2 * theta / (1 + theta)
    counted = counted_rate(*(torch.tensor([x], dtype=torch.float64) for x in (n, nonzero, n * m))).item()
    assert counted == pytest.approx(n * code_rate(torch.tensor(m, dtype=torch.float64)).item(), rel=1e-6)
    fewer = counted_rate(*(torch.tensor([x], dtype=torch.float64) for x in (n, nonzero / 2, n * m))).item()
    assert fewer < counted


def test_counted_by_hand():
    """Ten codes of magnitude 1 among a hundred take the bits of their places and of their signs."""
    bits = counted_rate(*(torch.tensor([float(x)]) for x in (100, 10, 10))).item()
    entropy = -0.1 * math.log2(0.1) - 0.9 * math.log2(0.9)
    assert bits == pytest.approx(100 * entropy + 10, rel=1e-5)
    assert counted_rate(torch.tensor([5.0]), torch.zeros(1), torch.zeros(1)).item() == 0
