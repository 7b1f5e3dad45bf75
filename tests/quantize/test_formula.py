"""The quantizer: its values, its closed-form gradient, what it keeps in memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_selfcompress.quantize import formula
from lightning_selfcompress.quantize.formula import (
    EXPONENT_STEPS,
    Range,
    bit_depth,
    code_bounds,
    codes,
    initial_exponent,
    q,
    q_composite,
    q_known,
    quantize,
    step_size,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # sums of at most some hundred float64 numbers near 1
LAYOUTS = {  # shape of the weight, shape of its depths
    "rows": ((5, 3, 2, 2), (5, 1, 1, 1)),
    "columns": ((6, 4), (1, 4)),
    "groups": ((2, 3, 4, 2), (2, 1, 4, 1)),
}
DEPTHS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.4, 8.0, 16.0]) | st.floats(0.0, 16.0)


def on_grid(e):
    """Exponents that are whole sixteenths."""
    return (e * EXPONENT_STEPS).round() / EXPONENT_STEPS


def make(shape, channels, raw_depths=None, dtype=torch.float64, seed=0):
    """A weight, raw depths and exponents at which some weights of a channel are clipped and some are not."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.rand(channels, generator=g, dtype=torch.float64) * 8 if raw_depths is None else raw_depths
    raw = torch.as_tensor(raw, dtype=torch.float64).reshape(channels)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2
    e = on_grid(torch.randn(channels, generator=g, dtype=torch.float64) - (raw - 1))
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), raw.to(wide), e.to(wide)


@st.composite
def problems(draw, depths=DEPTHS):
    """Weights of 1 to some hundred elements in any layout, with depths drawn channel by channel."""
    c, a, k, g = (draw(st.integers(1, 4)) for _ in range(4))
    layouts = [((c, a, k, g), (c, 1, 1, 1)), ((c, a), (c, 1)), ((a, c), (1, c)), ((g, a, c, k), (g, 1, c, 1))]
    shape, channels = draw(st.sampled_from(layouts))
    n = math.prod(channels)
    return make(shape, channels, draw(st.lists(depths, min_size=n, max_size=n)), seed=draw(st.integers(0, 2**16)))


def gradients(function, x, b, e, upstream=None):
    """Gradients of one of the two forms of q with respect to x, b and e."""
    x, b, e = (t.detach().clone().requires_grad_() for t in (x, b, e))
    out = function(x, b, e)
    return torch.autograd.grad(out, (x, b, e), torch.ones_like(out) if upstream is None else upstream)


def bounded(x, e):
    """The largest allowed distance |q - x|: half a level, and the rounding of float64."""
    return torch.exp2(e - 1).expand_as(x) * (1 + 1e-9)


@given(problems(depths=DEPTHS | st.floats(-2.0, 0.0)))
def test_closed_form_gradients_are_those_of_autograd(problem):
    """What x, the raw depths and e learn from q is what autograd derives from its formula."""
    x, raw, e = problem
    upstream = torch.randn_like(x)
    actual = gradients(lambda x, raw, e: q(x, bit_depth(raw), e), x, raw, e, upstream)
    expected = gradients(lambda x, raw, e: q_composite(x, bit_depth(raw), e), x, raw, e, upstream)
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("b", [1.0, 2.0, 8.0])
def test_a_weight_on_the_clip_limit_counts_as_inside(b):
    """On the limits of the clip range, where calibrated weights lie, both forms give the weight its whole gradient."""
    b = torch.full((1, 1), b, dtype=torch.float64)
    e = torch.zeros_like(b)
    x = torch.cat(code_bounds(b), 1)
    closed, composite = gradients(q, x, b, e), gradients(q_composite, x, b, e)
    assert closed[0].tolist() == [[1.0, 1.0]]
    assert_close(composite, closed, **EXACT)


def test_both_forms_agree_at_depth_zero():
    """At b = 0, where both limits of the clip range meet, both forms give b the same gradient."""
    x = torch.tensor([[-3.0, -0.2, 0.2, 3.0]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert_close(gradients(q, x, zero, zero), gradients(q_composite, x, zero, zero), **EXACT)


@given(problems(depths=st.sampled_from([0.1, 0.5, 1.0, 2.4, 8.0]) | st.floats(0.05, 8.0)))
def test_gradients_are_the_slopes_of_the_function_without_rounding(problem):
    """The gradients are the finite differences of 2^e (clip(2^-e x) + r), r being what rounding adds, held fixed."""
    x, b, e = problem
    low, high = code_bounds(b)
    level = x * torch.exp2(-e)
    added = codes(x, b, e) - torch.clamp(level, low, high)
    smooth = torch.minimum((level - low).abs(), (level - high).abs()) > 1e-3
    weight = torch.randn_like(x) * smooth  # weights near a kink of the clipping do not count

    def unrounded(x, b, e):
        return (weight * torch.exp2(e) * (torch.clamp(x * torch.exp2(-e), *code_bounds(b)) + added)).sum()

    h = 1e-6
    for k, actual in enumerate(gradients(q, x, b, e, weight)):
        for i in range(actual.numel()):
            ahead, back = ([t.clone() for t in (x, b, e)] for _ in range(2))
            ahead[k].view(-1)[i] += h
            back[k].view(-1)[i] -= h
            expected = (unrounded(*ahead) - unrounded(*back)) / (2 * h)
            assert actual.flatten()[i].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


@given(problems())
def test_all_forms_have_the_same_value(problem):
    """quantize, q and q_composite return the same numbers, the table's step times the codes, to the last bit."""
    x, b, e = problem
    expected = step_size(e) * codes(x, b, e)
    assert torch.equal(quantize(x, Range.of(b, e)), expected)
    for function in (q, q_composite):
        assert torch.equal(function(x, b, e), expected), function.__name__


@given(problems(), st.floats(-0.49, 0.49))
def test_exponents_count_in_whole_sixteenths(problem, off):
    """What lies between two sixteenths counts as the nearer one, in values and gradients, whatever the form."""
    x, b, e = problem
    between = e + off / EXPONENT_STEPS
    for function in (q, q_composite):
        assert torch.equal(function(x, b, between), function(x, b, e))
        assert_close(gradients(function, x, b, between), gradients(function, x, b, e), **EXACT)


def test_steps_do_not_depend_on_their_place():
    """The step of an exponent is the correctly rounded power of two, alone or among thousands."""
    e = torch.arange(-128 * EXPONENT_STEPS, 127 * EXPONENT_STEPS) / EXPONENT_STEPS
    expected = torch.exp2(e.double()).float()
    assert torch.equal(step_size(e), expected)
    assert torch.equal(torch.cat([step_size(part) for part in e.split(3)]), expected)
    assert step_size(torch.tensor([-1e9, 1e9])).tolist() == [2.0**-128, pytest.approx(2.0**128, rel=0.05)]


@given(problems(depths=st.just(0.0)))
def test_depth_zero_is_the_zero_channel(problem):
    """A channel of bit depth 0 is exactly zero, whatever its weights."""
    x, b, e = problem
    assert torch.equal(q(x, b, e), torch.zeros_like(x))


@given(problems())
def test_quantizing_twice_is_quantizing_once(problem):
    """q(q(x)) == q(x), to the last code."""
    x, b, e = problem
    once = q(x, b, e)
    assert torch.equal(codes(once, b, e), codes(x, b, e))
    assert_close(q(once, b, e), once, **EXACT)


@pytest.mark.parametrize(
    ("b", "levels"),
    [
        (0.0, [0]),
        (0.1, [-1, 0]),
        (1.0, [-1, 0]),
        (2.0, [-2, -1, 0, 1]),
        (2.4, [-3, -2, -1, 0, 1, 2]),
        (8.0, list(range(-128, 128))),
    ],
)
def test_number_of_levels(b, levels):
    """At b bits the codes are the integers that the clip range rounds to: 2^b of them where b is whole, 6 at 2.4."""
    x = torch.linspace(-200, 200, 4001)[None]
    found = codes(x, torch.full((1, 1), b), torch.zeros(1, 1))
    assert sorted({int(code) for code in found.flatten()}) == levels


@given(problems())
def test_error_is_at_most_half_a_level_inside_the_clip_range(problem):
    """Within the clip range q moves no weight by more than half a level; beyond it the code is the limit's."""
    x, b, e = problem
    low, high = code_bounds(b)
    level = x * torch.exp2(-e)
    inside = (level >= low) & (level <= high)
    assert bool(((q(x, b, e) - x).abs() <= bounded(x, e))[inside].all())
    limit = torch.where(level < low, low.round(), high.round())
    assert torch.equal(codes(x, b, e)[~inside], limit[~inside])


@given(problems(), st.floats(1.5, 16.0))
def test_initial_exponents_hold_all_weights(problem, bits):
    """At the initial exponent no weight moves by more than half a level, and the next smaller step would clip one."""
    x = problem[0].flatten(1)
    e = initial_exponent(x.amin(1), x.amax(1), bits, fallback=1.0)[:, None]
    b = torch.full_like(e, bits)
    assert bool(((q(x, b, e) - x).abs() <= bounded(x, e)).all())
    low, high = code_bounds(b)
    assert torch.equal(e, on_grid(e))
    level = x * torch.exp2(-(e - 1 / EXPONENT_STEPS))
    assert bool(((level < low) | (level > high)).any(1).all())


def test_channels_of_zeros_get_a_finite_exponent():
    """A channel of zeros starts with the largest exponent of the others, or the one that holds the fallback."""
    low, high = torch.tensor([-1.0, 0.0, -4.0]), torch.tensor([0.5, 0.0, 2.0])
    assert initial_exponent(low, high, 3.0, fallback=1.0).tolist() == [-2.0, 0.0, 0.0]
    assert initial_exponent(torch.zeros(2), torch.zeros(2), 2.0, fallback=0.25).tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 7, 13, 1000])
def test_blocks_change_nothing(layout, block, monkeypatch):
    """A large tensor that is worked on in blocks has the value and the gradients of one worked on whole."""
    x, b, e = make(*LAYOUTS[layout])
    whole = q(x, b, e), gradients(q, x, b, e, x)
    monkeypatch.setattr(formula, "_CPU_BLOCK", block)
    assert torch.equal(q(x, b, e), whole[0])
    assert_close(gradients(q, x, b, e, x), whole[1], **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_inputs_are_kept_for_backward(layout):
    """Between forward and backward q holds on to no tensor of the size of x but x."""
    leaves = [t.requires_grad_() for t in make(*LAYOUTS[layout])]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        q(*leaves)
    assert sorted(t.untyped_storage().data_ptr() for t in kept) == sorted(t.data_ptr() for t in leaves)


@given(problems(depths=DEPTHS | st.floats(-2.0, 0.0)))
def test_a_known_value_has_the_gradients_of_raw_depths(problem):
    """Given value and range, q returns the value's memory, with the gradients of the formula for flat raw depths."""
    x, raw, e = problem
    known = Range.of(bit_depth(raw), e)
    value, upstream, called = quantize(x, known), torch.randn_like(x), []

    def flat(x, raw, e):
        out = q_known(x, raw, e, value, known, lambda: called.append(1))
        assert out.data_ptr() == value.data_ptr()
        return out

    expected = gradients(lambda x, raw, e: q_composite(x, bit_depth(raw), e), x, raw, e, upstream)
    actual = gradients(flat, x, raw.flatten(), e.flatten(), upstream)
    assert called == [1]
    assert_close(actual, tuple(g.view_as(a) for g, a in zip(expected, actual, strict=True)), **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_double_backward(layout, frozen):
    """The gradient can be differentiated again, also where x, b or e is frozen: as autograd does with the formula."""
    inputs = make(*LAYOUTS[layout])

    def second(function):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        learned = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), learned, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), learned)

    def known(x, raw, e):
        depths = Range.of(bit_depth(raw.detach()), e.detach())
        return q_known(x, raw.flatten(), e.flatten(), quantize(x.detach(), depths), depths)

    assert_close(second(q), second(q_composite), **EXACT)
    assert_close(second(known), second(q_composite), **EXACT)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs_get_no_gradient(frozen):
    """Where x, b or e needs no gradient, the others get theirs unchanged."""
    inputs = make(*LAYOUTS["rows"])
    expected = gradients(q, *inputs)
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    q(*leaves).sum().backward()
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, expected[i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_weights_keep_float32_depths(layout):
    """bfloat16 weights are quantized in float32: same codes, and gradients of depths as precise as in float32."""
    x, b, e = make(*LAYOUTS[layout], dtype=torch.bfloat16)
    assert (x.dtype, b.dtype, e.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(q(x, b, e), q(x.float(), b, e).bfloat16())
    actual, expected = gradients(q, x, b, e, x), gradients(q, x.float(), b, e, x.float())
    assert [g.dtype for g in actual] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(actual[0], expected[0].bfloat16())
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize(
    ("depths", "exponents"),
    [((4, 1), (4,)), ((4,), (4,)), ((3, 1), (3, 1)), ((1, 4), (1, 4)), ((4, 1), (1, 1)), ((4, 1, 1), (4, 1, 1))],
)
def test_wrong_shapes_are_named(depths, exponents):
    """Depths and exponents that do not fit the weights are refused with all three shapes in the message."""
    with pytest.raises(ValueError, match="Expected bit depths and exponents of one shape") as error:
        q(torch.zeros(4, 6), torch.zeros(depths), torch.zeros(exponents))
    for shape in ((4, 6), depths, exponents):
        assert str(shape) in str(error.value)


def test_bit_depth_is_never_negative():
    """A raw depth below zero means no bits, and learns nothing: a dead channel stays dead."""
    raw = torch.tensor([-1.0, 0.0, 0.5, 8.0], requires_grad=True)
    bit_depth(raw).sum().backward()
    assert bit_depth(raw).tolist() == [0.0, 0.0, 0.5, 8.0]
    assert raw.grad.tolist() == [0.0, 0.0, 1.0, 1.0]
