"""The size that is asked for: what can be read, and what is refused."""

import pytest

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.budget.target import target_nbytes


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (51_200, 51_200),
        ("51_200", 51_200),
        ("50KB", 51_200),
        (" 50 kb ", 51_200),
        ("50KiB", 51_200),
        ("1.5 MB", 1_572_864),
        ("1GB", 1 << 30),
        ("600B", 600),
        ("3%", 30_000),
        ("0.05 %", 500),
        ("100%", 1_000_000),
        (1e3, 1000),
    ],
)
def test_sizes(size, nbytes):
    """Bytes, units of 1024 and shares of the float network are read."""
    assert target_nbytes(size, 1_000_000) == nbytes


@pytest.mark.parametrize(
    "size", ["50 K B", "", "KB", "-5KB", "-1", -1, 0, "0", "0%", "101%", "-3%", "3 percent", "1,000", "inf", 0.5, "nan"]
)
def test_what_cannot_be_read(size):
    """Anything else is refused by a message that says what is accepted and what was given."""
    with pytest.raises(ValueError, match=r"50KB.*3%") as caught:
        target_nbytes(size, 1_000_000)
    assert repr(size) in str(caught.value)
    with pytest.raises(ValueError, match="target_size"):
        SelfCompression(target_size=size)


@pytest.mark.parametrize("size", [True, [1], b"5"])
def test_what_is_no_size(size):
    """What is neither a number nor text is a TypeError."""
    with pytest.raises(TypeError, match="target_size"):
        target_nbytes(size, 1_000_000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "gamma.*target_size"),
        ({"gamma": 0.1, "target_size": "3%"}, TypeError, "either gamma or target_size"),
        ({"target_size": "3%", "bits_lr": 0}, ValueError, "bits_lr > 0"),
        ({"target_size": "3%", "prune_every_n_epochs": 0}, ValueError, "prune_every_n_epochs > 0"),
        ({"gamma": 0.1, "price": "kilograms"}, ValueError, "'bits', 'bytes'"),
        ({"gamma": 0.1, "price": 3}, TypeError, "price"),
    ],
)
def test_goals_that_exclude_each_other(arguments, error, message):
    """A callback has one goal, which it must be able to reach."""
    with pytest.raises(error, match=message):
        SelfCompression(**arguments)
