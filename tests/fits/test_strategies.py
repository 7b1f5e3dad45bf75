"""Training under each of the Trainer's strategies: the same smaller network in every process, or a refusal before."""

import pytest
import torch
from fits import Widths, assert_only_living, fit, largest_difference
from lightning.pytorch.strategies import SingleDeviceStrategy
from networks import Lit, batches, make_trainer
from torch.multiprocessing import ProcessRaisedException
from two_processes import TRAININGS, run_two

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.layers import Quantized

SMALLER = [[4, 4, 4 * 36, 13], [3, 3, 3 * 36, 12], [3, 3, 3 * 36, 10], [3, 3, 3 * 36, 10]]
FULL = [[6, 6, 6 * 36, 16]] * 4

needs_fsdp2 = pytest.mark.skipif("FSDP2" not in TRAININGS, reason="before torch 2.6 FSDP2 needs a GPU")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes ended with, for each training."""
    return run_two(tmp_path_factory.mktemp("two"), *TRAININGS)


def assert_alike(one, other):
    """Both processes have the same network, though they saw different batches."""
    assert one["shapes"] == other["shapes"]
    assert one["values"] == other["values"]
    assert one["losses"] != other["losses"]


@pytest.mark.case("Strategies", "a single device")
def test_single_device():
    """On one device dead channels leave, and optimizers hold what is left."""
    widths = Widths()
    model, trainer = fit(1, widths, strategy=SingleDeviceStrategy("cpu"), accelerator="auto")
    assert [list(w) for w in widths.seen] == SMALLER
    assert_only_living(trainer, model)


@pytest.mark.case("Strategies", "DDP with two processes: {how}")
@pytest.mark.parametrize(
    "how", ["plain", "find_unused_parameters", "static_graph", "gradient_as_bucket_view", "a frozen layer"]
)
def test_two_processes_stay_alike(how, two):
    """Under DDP both processes end with the same smaller network, and with the losses of one that kept all."""
    removed = two[how]
    kept = two.get(f"{how}, kept", two["kept"])
    assert removed[0]["widths"] == removed[1]["widths"] == SMALLER
    assert kept[0]["widths"] == FULL
    assert_alike(*removed)
    assert [(r["depths written by DDP"], r["left behind"]) for r in removed] == [(0, [])] * 2
    assert removed[0]["batches under DDP"] == len(removed[0]["losses"])
    for one, other in zip(removed, kept, strict=True):
        difference = largest_difference(one["losses"], other["losses"])
        print(f"DDP, {how}: {difference:.2e}")
        assert difference < 1e-5


@pytest.mark.case("Strategies", "DDP with two processes: activations in 8 bits")
def test_two_processes_quantize_activations_alike(two):
    """Exponents of activations start and learn alike in both processes, DDP leaves them alone, and channels leave."""
    one, other = two["activations"]
    assert one["exponents"] == other["exponents"]
    assert len(one["exponents"]) == 3
    assert one["losses"] != other["losses"]
    assert [r["written by DDP"] for r in (one, other)] == [0, 0]
    assert one["widths"] == other["widths"] == [3, 12]


@pytest.mark.case("Strategies", "DDP with two processes: a budget of bytes")
def test_two_processes_within_a_budget(two):
    """Both processes end with the same file, to the byte, at or just under the target; the first one logs."""
    one, other = two["budget"]
    assert one["file"] == other["file"]
    assert 0.9 * 1500 <= one["nbytes"] <= 1500
    assert one["event files"] == other["event files"] == 1
    assert one["losses"] != other["losses"]


def test_two_processes_keep_one_front(two):
    """Both know the front by the first process's metric, and the files of others are gone once."""
    one, other = two["pareto"]
    assert one == other
    assert [metric for metric, *_ in one["front"]][-1] == 2.0
    assert one["files"] == sorted(name for *_, name in one["front"])


@needs_fsdp2
@pytest.mark.case("Strategies", "FSDP2 (ModelParallelStrategy with fully_shard), quantization")
def test_sharded_weights_are_quantized(two):
    """FSDP2 on two processes has, to the bit, the losses and the weights of DDP without removal."""
    assert_alike(*two["FSDP2"])
    assert two["FSDP2"][0]["values"] == two["nothing removed"][0]["values"]
    assert [r["losses"] for r in two["FSDP2"]] == [r["losses"] for r in two["nothing removed"]]


@needs_fsdp2
def test_sharded_weights_are_shown(two):
    """Under FSDP2 all processes gather what the first one writes for TensorBoard, so none waits for another."""
    assert [r["event files"] for r in two["FSDP2"]] == [1, 1]


@needs_fsdp2
@pytest.mark.case("Strategies", "FSDP2, removal of channels")
def test_sharded_channels_stay_which_is_said_once(two, refusal):
    """Under FSDP2 no channel is removed, which one warning says."""
    assert two["FSDP2"][0]["widths"] == FULL
    (said,) = two["FSDP2"][0]["said"]
    assert said.startswith("SelfCompression: ModelParallelStrategy shards parameters, so no channels are removed")
    refusal.say(said)


@needs_fsdp2
@pytest.mark.case("Strategies", "{how}")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "tensor parallel",
            "no process ever holds a whole weight. Expected ModelParallelStrategy(data_parallel_size=2",
        ),
        ("converted, then sharded", "got 'net.0.weight', converted before fully_shard"),
    ],
)
def test_other_sharding_is_refused(how, said, two, refusal):
    """What cannot be quantized in parts is refused in every process, with what to do instead."""
    one, other = (r["refused"] for r in two[how])
    assert said in one
    assert one == other
    refusal.say(one)


@pytest.mark.case("Strategies", "{strategy}")
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_with_copies_are_refused(strategy, refusal):
    """Where only copies of the module would be trained, nothing is: the error says so, the module is as it was."""
    model = Lit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ProcessRaisedException, match="cannot train with ddp_spawn, ddp_fork or ddp_") as caught:
        make_trainer(SelfCompression(gamma=0.01), devices=2, strategy=strategy).fit(model, batches())
    said = str(caught.value).strip().splitlines()[-1]
    assert said.startswith("RuntimeError: SelfCompression cannot train")
    refusal.say(said.removeprefix("RuntimeError: "))
    assert not any(isinstance(m, Quantized) for m in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.losses == []


class FSDPStrategy(SingleDeviceStrategy):
    """Called like the one that needs a GPU."""


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Called like the one of a package that is not installed."""


@pytest.mark.case("Strategies", "{strategy.__name__}")
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_bypass_the_quantizer_are_refused(strategy, refusal):
    """A strategy that takes weights or optimizers over is refused by name, before anything is converted."""
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.01), strategy=strategy(device="cpu"), accelerator="auto")
    with refusal(RuntimeError, rf"cannot train with {strategy.__name__}: .* Expected a single device, DDP, or"):
        trainer.fit(model, batches())
    assert not any(isinstance(m, Quantized) for m in model.modules())
    assert model.losses == []
