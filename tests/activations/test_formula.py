"""The quantizer of activations: its values, its closed-form gradient, the choice of its step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_selfcompress.activations.formula import best_exponent, code_limits, q_a, q_a_composite
from lightning_selfcompress.quantize.formula import step_size

BITS = st.integers(2, 8)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make(seed, exponent, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, generator=generator, dtype=dtype, requires_grad=True)
    return x, torch.full((1,), exponent, dtype=dtype, requires_grad=True)


@given(bits=BITS, signed=st.booleans(), exponent=st.floats(-9, 1), seed=st.integers(0, 99))
def test_values_are_the_nearest_levels(bits, signed, exponent, seed):
    """Every value goes to the nearest of the levels that the bits allow."""
    x, e = make(seed, exponent)
    low, high = code_limits(bits, signed)
    levels = torch.arange(low, high + 1, dtype=torch.float64) * step_size(e)
    assert len(levels) == 2**bits
    nearest = levels[(x.detach()[..., None] - levels).abs().argmin(-1)]
    assert_close(q_a(x, e, bits, signed).detach(), nearest, **EXACT)


@given(bits=BITS, signed=st.booleans(), exponent=st.floats(-9, 1), seed=st.integers(0, 99))
def test_quantizing_again_changes_nothing(bits, signed, exponent, seed):
    """What was quantized is a level, and stays it."""
    x, e = make(seed, exponent)
    once = q_a(x, e, bits, signed)
    assert torch.equal(q_a(once, e, bits, signed), once)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(signed):
    """A dead channel stays dead."""
    assert torch.equal(q_a(torch.zeros(7), torch.tensor(0.3), 8, signed), torch.zeros(7))


@given(bits=BITS, signed=st.booleans(), exponent=st.floats(-9, 1), seed=st.integers(0, 99))
def test_closed_form_equals_autograd(bits, signed, exponent, seed):
    """Output and both gradients are those of the ordinary operations with a straight-through estimator."""
    found = []
    for function in (
        lambda x, e: q_a(x, e, bits, signed),
        lambda x, e: q_a_composite(x, e, *code_limits(bits, signed)),
    ):
        x, e = make(seed, exponent)
        out = function(x, e)
        out.backward(torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x))
        found.append((out.detach(), x.grad, e.grad))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradients_by_hand():
    """Inside of the range x gets the gradient and e the rounding error; outside x gets none and e the limit."""
    x = torch.tensor([0.3, -1.0, 9.0], dtype=torch.float64, requires_grad=True)
    e = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)  # a step of 0.5, codes 0 to 3
    q_a(x, e, 2, False).backward(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    by_hand = torch.log(torch.tensor(2.0, dtype=torch.float64)) * 0.5 * (1.0 * (1 - 0.6) + 10.0 * 0 + 100.0 * 3)
    assert_close(e.grad, by_hand.view(1), **EXACT)


def test_exponent_alone_follows_a_finite_difference():
    """Where all is clipped the output is proportional to the step, so the gradient is a true derivative."""
    x, delta = torch.full((4,), 50.0, dtype=torch.float64), 1 / 16
    e = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    out = q_a(x, e, 4, False).sum()
    out.backward()
    wider = q_a(x, e.detach() + delta, 4, False).sum()
    assert_close((wider / out).log().item(), (e.grad.item() / out.item()) * delta, rtol=1e-9, atol=0)


def test_second_derivatives_exist():
    """A penalty on gradients can be differentiated with respect to what the quantizer reads."""
    x, e = make(0, -3.0)
    (first,) = torch.autograd.grad(q_a(x, e, 8, True).pow(3).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), (x, e))
    assert all(bool(g.abs().sum() > 0) for g in second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(dtype):
    """In a narrow dtype the levels are those of float32, rounded to it, and gradients have its dtype."""
    x, e = make(1, -4.3, torch.float32)
    narrow = x.detach().to(dtype).requires_grad_()
    out = q_a(narrow, e, 8, True)
    assert torch.equal(out, q_a(narrow.detach().float(), e, 8, True).to(dtype))
    out.sum().backward()
    assert (narrow.grad.dtype, e.grad.dtype) == (dtype, torch.float32)


def test_a_compiled_quantizer_is_one_graph():
    """Compiled without a break, outputs and gradients are those of eager mode."""
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        x, e = make(2, -3.0)
        out = wrap(lambda x, e: q_a(x, e, 8, True))(x, e)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, e.grad))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, **EXACT)


def test_a_number_keeps_its_shape():
    """A tensor of no dimension comes back as one, from the closed form and from the ordinary operations."""
    x, e = torch.tensor(0.7), torch.tensor(-2.0)
    assert q_a(x, e, 8, True).shape == q_a_composite(x, e, -128, 127).shape == ()


@given(bits=BITS, signed=st.booleans(), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 20))
def test_no_other_exponent_is_better(bits, signed, scale, seed):
    """Up to the exponent at which nothing is clipped, the one chosen has the least squared error, at any scale."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed)).double() * scale
    x = x if signed else x.relu()
    chosen = best_exponent(x, bits, signed)
    assert chosen * 16 == round(chosen * 16)

    def error(exponent):
        return float((q_a(x, torch.tensor(exponent).double(), bits, signed) - x).square().sum())

    nothing_clipped = math.ceil(16 * math.log2(float(x.abs().max()) / code_limits(bits, signed)[1])) / 16
    assert chosen <= nothing_clipped
    assert all(error(chosen) <= error(nothing_clipped - n / 16) * (1 + 1e-12) for n in range(32))


def test_activations_of_zero_have_a_step():
    """Activations that are all zero, or none at all, still get a finite exponent."""
    assert best_exponent(torch.zeros(9), 8, False) == best_exponent(torch.zeros(0), 8, True) == -8.0
