"""Removal from parameters that FSDP2 shards: as on one device, in every process."""

import pytest
from shards import OPTIMIZERS, fully_shard, run

pytestmark = pytest.mark.skipif(fully_shard is None, reason="before torch 2.6 FSDP2 needs a GPU")

SMALLER = [[3, 1, 3, 3], [1, 3, 3, 3], [3, 16], [3, 3], [3]]  # one row over two processes: one of them holds nothing


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("shards"), 2)


def assert_as_one_device(processes):
    for result in processes:
        one, many = result["widths"]
        assert one == many == SMALLER
        assert result["sizes"] == [3, 3, 16]
        assert max(abs(a - b) for a, b in result["losses"]) < 1e-5
        assert max(result["weights"]) < 1e-5
        assert max(result["gradients"]) < 1e-5
        assert result["state"][0] == result["state"][1]
        assert result["same objects"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_removals_over_two_processes(optimizer, two):
    """Losses, weights, gradients, widths and the optimizer's state are those of one device; parameters stay objects."""
    assert_as_one_device([result[optimizer] for result in two])


@pytest.mark.nightly
def test_three_removals_over_four_processes(tmp_path):
    """Four processes, some of which hold no row of a weight, end with what one device ends with."""
    assert_as_one_device([result[optimizer] for result in run(tmp_path, 4) for optimizer in OPTIMIZERS])


@pytest.mark.parametrize(
    ("how", "said"),
    [("unreduced", "to be reduced before a removal"), ("sharded elsewhere", "to be sharded by fully_shard")],
)
def test_what_cannot_be_sharded_again_is_refused(how, said, two):
    """Every process says the same, and no parameter has changed."""
    one, other = (result[how] for result in two)
    assert said in one["refused"]
    assert one == other
    assert one["unchanged"]
