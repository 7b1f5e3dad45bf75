"""float32 values in one byte each: exact where a file stores them so, and rounded within a bound where asked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_selfcompress.packing import Packed, as_it_is, from_bytes, rounded, stored_dtype, to_bytes
from lightning_selfcompress.packing.narrow_floats import (
    from_logarithmic,
    from_scaled_int8,
    logarithmic,
    scaled_int8,
)
from lightning_selfcompress.packing.storages import (
    CONSTANT,
    HALF,
    INT8,
    LOGARITHMIC,
    RAW,
    SCALED,
    storage_of,
    to_stored,
)
from lightning_selfcompress.quantize.formula import step_size

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def back(tensor):
    """The tensor after it was written to a file and read, and the bytes of its values."""
    one = as_it_is("x", tensor)
    (read,) = from_bytes(to_bytes(Packed((one,), {}))).tensors
    assert read.storage == one.storage
    return read.tensor(), len(to_stored(tensor, one.storage))


@given(st.integers(-155, 121), st.lists(st.integers(-127, 127), min_size=3, max_size=200))
def test_scaled(scale, integers):
    """Integers times a power of two take a byte each, and come back to the bit."""
    values = torch.tensor(np.ldexp(np.array(integers, float), scale), dtype=torch.float32)
    read, nbytes = back(values)
    assert read.numpy().tobytes() == values.numpy().tobytes()
    found = scaled_int8(values)
    if scale >= -149:  # float32 numbers are multiples of 2^-149
        assert torch.equal(from_scaled_int8(*found), values)
        assert nbytes <= len(integers) + 2


@given(st.integers(-2048, 2047), st.lists(st.integers(0, 255), min_size=3, max_size=200))
def test_logarithmic(first, numbers):
    """Steps of the quantizer take a byte each within 256 of them, and come back to the bit."""
    exponents = (torch.tensor(numbers) + first).clamp_max(2047)
    values = step_size(exponents.double() / 16).float()
    assert torch.equal(from_logarithmic(*logarithmic(values)), values)
    read, nbytes = back(values)
    assert torch.equal(read, values)
    assert nbytes <= len(numbers) + 2


@given(st.lists(FLOATS, min_size=1, max_size=100))
def test_rounded_values_take_a_byte_each(values):
    """Any finite values, rounded, take a byte each and two more, are within the bound, and stay as they are then."""
    x = torch.tensor(values, dtype=torch.float32)
    y = rounded(x)
    assert y.shape == x.shape
    assert torch.equal(rounded(y), y)
    read, nbytes = back(y)
    assert torch.equal(read, y)
    assert nbytes <= len(values) + 2 or len(values) == 1
    if bool((x <= 0).any()):
        assert float((y.double() - x).abs().max()) <= max(float(x.double().abs().max()) / 127, 2.0**-149)


@given(st.lists(st.floats(2**-7, 2**8, width=32), min_size=1, max_size=100))
def test_positive_values_are_within_two_percent(values):
    """Positive values within a range of 2^15 are rounded by 2.2% at most, by root mean square."""
    x = torch.tensor(values, dtype=torch.float32)
    error = (rounded(x).double() - x) / x
    assert float(error.square().mean().sqrt()) <= 2 ** (1 / 32) - 1 + 1e-6


def test_rounded_leaves_alone_what_it_cannot_round():
    """Other dtypes, infinity, NaN and empty tensors are returned as they are."""
    for x in (
        torch.randn(3).double(),
        torch.tensor([1.0, torch.inf]),
        torch.tensor([torch.nan]),
        torch.zeros(0),
        torch.arange(3),
    ):
        assert rounded(x) is x
    assert rounded(torch.zeros(2, 3)).equal(torch.zeros(2, 3))


CASES = {
    "one value": (torch.full((40,), 0.1), CONSTANT),
    "one value of few entries": (torch.full((2,), 0.5), SCALED),
    "one whole number": (torch.full((9,), 3), CONSTANT),
    "few whole numbers": (torch.full((3,), 3), INT8),
    "one NaN": (torch.full((9,), torch.nan), CONSTANT),
    "a negative zero": (torch.tensor([0.0, -0.0, 0.0, 0.0]), HALF),
    "negative zeros": (torch.full((4,), -0.0), CONSTANT),
    "one entry": (torch.tensor([0.1]), RAW),
    "no dimension": (torch.tensor(0.5), HALF),
    "nothing": (torch.zeros(0), HALF),
    "wide integers": (torch.tensor([129.0, 1.0, 1.0]), HALF),
    "integers": (torch.tensor([127.0, 1.0, -127.0]), SCALED),
    "steps": (step_size(torch.tensor([0.0625, 0.0, 15.9375])), LOGARITHMIC),
    "a step too many": (step_size(torch.tensor([0.0625, 0.0, 16.0])), RAW),
    "infinity": (torch.tensor([1.0, torch.inf, 2.0]), HALF),
    "complex": (torch.full((3, 2), 1 + 2j), CONSTANT),
    "truth": (torch.ones(5, dtype=torch.bool), CONSTANT),
    "both truths": (torch.tensor([True, False]), RAW),
}


@pytest.mark.parametrize("name", CASES)
def test_the_storage_of_fewest_bytes(name):
    """The smallest storage that holds all values to the bit is taken, and they come back."""
    values, storage = CASES[name]
    assert storage_of(values) == storage
    read, _ = back(values)
    assert (read.dtype, read.shape) == (values.dtype, values.shape)
    assert read.numpy().tobytes() == values.numpy().tobytes()


def test_one_value_shares_no_memory():
    """A tensor of one value can be changed entry by entry when it is read."""
    read, _ = back(torch.ones(40))
    read[3] = 2.0
    assert read.sum() == 41


def test_a_normalization_takes_a_byte_for_a_value():
    """The rounded tensors of a batch normalization, which a file names by their dtypes in it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(50)
    norm(torch.randn(99, 50))
    for tensor in norm.state_dict(keep_vars=True).values():
        tensor.data.copy_(rounded(tensor.detach()))
    packed = Packed.of(norm)
    kinds = {t.name: stored_dtype(t) for t in packed.tensors}
    assert kinds["running_mean"] == torch.int8
    assert kinds["running_var"] in (torch.int8, torch.uint8)
    assert len(to_bytes(packed)) < 200


def test_a_tiny_value_does_not_decide():
    """Variances over many octaves stay positive although one of them, of a constant, is next to zero."""
    variances = torch.tensor([3.6e-20, 0.003, 0.02, 0.4, 1.19])
    found = rounded(variances)
    assert bool((found > 0).all())
    torch.testing.assert_close(found[1:], variances[1:], rtol=0.022, atol=0)
