"""Channels that leave a network while a Trainer trains it. Run as a script, it is one DDP training of its own."""

import copy
import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import networks
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from networks import Gan, Lit, batches

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.fade import Fading
from lightning_selfcompress.graph import Watcher, stored_tensors
from lightning_selfcompress.layers import quantized_parameters

NEVER = 10**6  # epochs from one removal to the next, in a fit that watches and fades but removes nothing
SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}, 1: {"net.0": [0], "net.4": [3]}, 2: {"net.4": [8, 9]}}


class Kill(pl.Callback):
    """Brings depths to zero after the first step of some epochs: epoch -> layer -> channels, as first numbered."""

    def __init__(self, schedule=SCHEDULE):
        self.schedule = schedule

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch = trainer.current_epoch
        if batch_idx or epoch not in self.schedule:
            return
        removed = self.removed(trainer)
        for quantized in quantized_parameters(pl_module):
            layer = quantized.name.removesuffix(".weight")
            earlier = sorted(n for e, names in self.schedule.items() if e < epoch for n in names.get(layer, ()))
            for number in self.schedule[epoch].get(layer, ()):
                place = number - sum(n < number for n in earlier) if removed else number
                quantized.raw_depth.data.view(-1)[place] = -1.0
            quantized.layer.forget_quantized()

    def removed(self, trainer):
        compression = next(c for c in trainer.callbacks if isinstance(c, SelfCompression))
        return 0 < compression.prune_every_n_epochs < NEVER


class Hold(pl.Callback):
    """Fades the constants of dead channels where nothing is removed, on channels watched here."""

    def on_train_start(self, trainer, pl_module):
        net = copy.deepcopy(pl_module)
        watcher = Watcher(net)
        with watcher:
            watcher.pin_outputs(net.loss(next(iter(data(n=1)))), "it is the loss")
        self.fading = Fading(pl_module, watcher.channels())

    def on_train_batch_end(self, *_):
        self.fading.step()


class Widths(pl.Callback):
    """Writes down the widths at the end of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        net = pl_module.net
        self.seen.append((net[0].out_channels, net[1].num_features, net[4].in_features, net[6].in_features))


make_trainer = partial(networks.make_trainer, max_epochs=4)


def data(dtype=torch.float64, n=60):
    """An epoch of more steps than a fade takes."""
    return batches(n, 4, dtype=dtype)


def fit(every, *callbacks, gamma=0.01, make=Lit, round_to=1, schedule=SCHEDULE, **kwargs):
    """A training in float64: in float32 a code that is rounded the other way shows in the third digit of a loss."""
    torch.manual_seed(1)
    model = make()
    kwargs = {"precision": "64-true"} | kwargs
    dtype = torch.float64 if kwargs["precision"] == "64-true" else torch.float32
    compression = SelfCompression(gamma=gamma, prune_every_n_epochs=every, round_to=round_to)
    trainer = make_trainer(compression, *callbacks, Kill(schedule), **kwargs)
    trainer.fit(model, data(dtype, 60 * trainer.world_size))
    return model, trainer


def largest_difference(some, others):
    assert len(some) == len(others) > 0
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def assert_only_living(trainer, model):
    """Optimizers hold the module's own parameters, and state of theirs alone, in their shapes."""
    (compression,) = (c for c in trainer.callbacks if isinstance(c, SelfCompression))
    depth = {id(t) for p in quantized_parameters(model) for t in (p.raw_depth, p.exponent)}
    own = {id(p) for p in model.parameters()}
    adams = [d.adam for d in compression._depth_optimizers]
    held = []
    for optimizer in [*trainer.optimizers, *adams]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        held += map(id, params)
        assert {id(p) for p in optimizer.state} <= {id(p) for p in params}
        for p, state in optimizer.state.items():
            assert all(t.shape == p.shape for t in state.values() if isinstance(t, torch.Tensor) and t.dim())
    assert sorted(held) == sorted(own)
    assert depth.isdisjoint(id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"])


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_dead_channels_leave_and_no_loss_changes(gamma):
    """After each epoch dead channels are gone for good, and every loss is that of the network that kept them."""
    widths = Widths()
    model, trainer = fit(1, widths, gamma=gamma)
    assert widths.seen == [(4, 4, 4 * 36, 13), (3, 3, 3 * 36, 12), (3, 3, 3 * 36, 10), (3, 3, 3 * 36, 10)]
    assert_only_living(trainer, model)
    assert "training_step" not in model.__dict__

    # without channels Q is another function of depths, so that only gamma=0 compares with removal switched off
    kept, _ = fit(0, Hold(), gamma=gamma) if gamma == 0 else fit(NEVER, gamma=gamma)
    assert kept.net[0].out_channels == 6
    assert len(model.losses) == 240
    difference = largest_difference(model.losses, kept.losses)
    print(f"gamma {gamma}: {difference:.2e}")
    assert difference < 1e-5
    assert model.losses[-1] != model.losses[-61]


def test_removal_between_accumulated_batches():
    """Where gradients are accumulated, every loss is still that of the network that kept all channels."""
    model, trainer = fit(1, accumulate_grad_batches=4)
    kept, _ = fit(NEVER, accumulate_grad_batches=4)
    assert model.net[0].out_channels == 3
    assert_only_living(trainer, model)
    difference = largest_difference(model.losses, kept.losses)
    print(f"accumulated: {difference:.2e}")
    assert difference < 1e-5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_removal_in_low_precision(precision):
    """In float32 and bfloat16 the same channels go, and the first losses after it are those of the network before."""
    model, trainer = fit(1, precision=precision)
    kept, _ = fit(NEVER, precision=precision)
    assert model.net[0].out_channels == 3
    assert model.net[4].out_features == 10
    assert_only_living(trainer, model)
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    difference = largest_difference(model.losses[:65], kept.losses[:65])
    print(f"{precision}: {difference:.2e}, all: {largest_difference(model.losses, kept.losses):.2e}")
    assert difference < tolerance


def test_logs_what_is_left(tmp_path):
    """The share of weights left and the channels of each layer are logged, and are those of the network."""
    logger = CSVLogger(tmp_path, name="", version="")
    model, trainer = fit(1, logger=logger)
    report = size_report(model)
    metrics = trainer.callback_metrics
    assert metrics["selfcompress/weights_left"] == pytest.approx(report.weights_left)
    assert report.weights_left < 0.4
    assert metrics["selfcompress/channels/net.0"] == 3
    assert metrics["selfcompress/channels/net.4"] == 10
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["selfcompress/channels/net.4"]]
    assert [float(row["selfcompress/channels/net.4"]) for row in rows] == [13, 12, 10, 10]
    left = [float(row["selfcompress/weights_left"]) for row in rows]
    assert left == sorted(left, reverse=True)
    assert left[-1] == pytest.approx(report.weights_left)


class Odd(Lit):
    """A step that goes wrong: it raises, returns nothing, or is never called."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.tensors = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.fault == "skip" and batch_idx == 0 and self.trainer.current_epoch < 2:
            return -1
        return None

    def training_step(self, batch, batch_idx):
        hidden = self.net[:3](batch[0])
        self.tensors += [batch[0], hidden, self.net[3:](hidden)]
        if self.fault == "raise" and batch_idx == 0:
            raise ArithmeticError("no luck")
        if self.fault == "none" and batch_idx % 4 != 3:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of the instance"])
@pytest.mark.parametrize("fault", ["raise", "none", "skip"])
def test_watching_leaves_nothing_behind(fault, own):
    """However a watched step ends, the module's step is its own again, and no tensor is marked."""
    model = Odd(fault)
    if own:
        step = model.training_step
        model.training_step = step
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill({}), max_epochs=3)
    if fault == "raise":
        with pytest.raises(ArithmeticError, match="no luck"):
            trainer.fit(model, batches())
    else:
        trainer.fit(model, batches())
    assert model.tensors
    assert model.__dict__.get("training_step") is (step if own else None)
    for tensor in [*stored_tensors(model).values(), *model.tensors]:
        assert not hasattr(tensor, "_selfcompress_layout")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class NoneAtFirst(Lit):
    def training_step(self, batch, batch_idx):
        self.logits = self.net(batch[0])  # with its graph, as Lightning's own GAN example keeps its images
        return super().training_step(batch, batch_idx) if batch_idx else None


def test_step_that_returns_nothing_says_nothing_about_outputs():
    """Where the first step returns None, a later one tells which channels are outputs: these stay, others go."""
    model, _ = fit(1, make=NoneAtFirst, schedule={0: {"net.0": [2], "net.6": [1]}}, max_epochs=2)
    assert model.net[0].out_channels == 5
    assert model.net[6].out_features == 4


class RecordingGan(Gan):
    def __init__(self):
        super().__init__()
        self.losses = []

    def manual_backward(self, loss, *args, **kwargs):
        self.losses.append(loss.item())
        super().manual_backward(loss, *args, **kwargs)


GAN = {0: {"generator.0": [2, 5], "discriminator.0": [11]}, 1: {"generator.0": [0], "discriminator.0": [0, 4]}}


def test_two_optimizers_and_manual_optimization():
    """Under manual optimization both networks of a GAN shrink, and neither loss is another for it."""
    model, trainer = fit(1, make=RecordingGan, schedule=GAN, max_epochs=3)
    kept, _ = fit(NEVER, make=RecordingGan, schedule=GAN, max_epochs=3)
    assert (model.generator[0].out_features, model.generator[2].in_features) == (9, 9)
    assert (model.discriminator[0].out_features, model.discriminator[2].in_features) == (9, 9)
    assert_only_living(trainer, model)
    assert len(model.losses) == 2 * 180
    difference = largest_difference(model.losses, kept.losses)
    print(f"GAN: {difference:.2e}")
    assert difference < 1e-5


def test_checkpoint_larger_than_the_network(tmp_path):
    """A checkpoint from before a removal is tested in its own shapes, in the network that has shrunk since."""
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    schedule = {1: SCHEDULE[0], 2: SCHEDULE[1]}
    model, trainer = fit(1, saved, schedule=schedule, enable_checkpointing=True)
    assert model.net[0].out_channels == 3
    (in_place,) = trainer.test(model, data(n=8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert (model.net[0].out_channels, model.net[1].num_features, model.net[4].in_features) == (6, 6, 6 * 36)

    fresh = make_trainer(SelfCompression(gamma=0.01), precision="64-true")
    (expected,) = fresh.test(Lit().double(), data(n=8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert in_place["test_loss"] == expected["test_loss"]


def test_resuming_into_a_network_of_full_size(tmp_path):
    """A training that goes on from a shrunk checkpoint in a fresh network has the losses of one never stopped."""
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last=True)
    whole, _ = fit(1, saved, enable_checkpointing=True)
    model = Lit().double()  # Lightning loads a checkpoint before it changes the precision
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), precision="64-true")
    trainer.fit(model, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert model.net[4].out_features == 10
    assert_only_living(trainer, model)
    difference = largest_difference(model.losses, whole.losses[120:])
    print(f"resumed: {difference:.2e}")
    assert difference < 1e-5

    longer = make_trainer(SelfCompression(gamma=0.01), precision="64-true", max_epochs=5)
    longer.fit(Lit(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert_only_living(longer, longer.lightning_module)
    assert longer.lightning_module.net[4].out_features == 10


class FSDPStrategy(SingleDeviceStrategy):
    """Shards nothing, but is called like one that does."""


def test_sharding_removes_nothing_and_says_so_once():
    """Where parameters are sharded nothing is removed, which is said once; bit depths are learned all the same."""
    with pytest.warns(UserWarning, match="no channels are removed") as caught:
        model, trainer = fit(1, strategy=FSDPStrategy(device="cpu"), accelerator="auto", max_epochs=2)
    said = [str(w.message) for w in caught if "SelfCompression" in str(w.message)]
    assert len(said) == 1
    assert "FSDPStrategy" in said[0]
    assert model.net[0].out_channels == 6
    assert trainer.callback_metrics["selfcompress/bits_per_weight"] < 7.9


@pytest.mark.parametrize("name", ["prune_every_n_epochs", "round_to"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_refuses_what_is_no_count(name, value):
    """A number of epochs or channels that is none is refused in words that name it and the value."""
    with pytest.raises(ValueError, match=f"Expected {name} to be a whole number >= .*{value!r}"):
        SelfCompression(gamma=0.01, **{name: value})


def test_zero_epochs_are_allowed_and_zero_widths_not():
    """Zero switches removal off; widths have no multiples of zero."""
    assert SelfCompression(gamma=0.01, prune_every_n_epochs=0).prune_every_n_epochs == 0
    with pytest.raises(ValueError, match="Expected round_to to be a whole number >= 1, got 0"):
        SelfCompression(gamma=0.01, round_to=0)


def test_widths_stay_multiples():
    """With round_to=4 only as many dead channels go as leave a multiple of 4."""
    widths = Widths()
    model, _ = fit(1, widths, round_to=4, schedule={0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}, max_epochs=2)
    assert widths.seen == [(4, 4, 4 * 36, 16)] * 2
    alive = [int((p.raw_depth > 0).sum()) for p in quantized_parameters(model)]
    assert alive == [4, 13, 4]


def test_removal_every_second_epoch():
    """Channels go at the end of every n-th epoch only."""
    widths = Widths()
    fit(2, widths, schedule={0: SCHEDULE[0]}, precision="32-true")
    assert [w[0] for w in widths.seen] == [6, 4, 4, 4]


def train_two(every: int, folder: Path) -> None:
    """What each of two processes does; every one writes down what it ends with."""
    widths = Widths()
    model, trainer = fit(every, widths, devices=2, strategy="ddp")
    names = {name: tuple(t.shape) for name, t in model.named_parameters()}
    values = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    assert_only_living(trainer, model)
    result = {"losses": model.losses, "widths": widths.seen, "shapes": names, "values": values.tolist()}
    (folder / f"{every}-{trainer.global_rank}.json").write_text(json.dumps(result))


def run_two(every, folder):
    mine = ("RANK", "WORLD_SIZE", "MASTER_", "NODE_RANK", "PL_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_RANK", *mine))} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(every), str(folder)], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{every}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_stay_alike(tmp_path):
    """Under DDP both processes end with the same smaller network, and with the losses of one that kept all."""
    removed, kept = run_two(1, tmp_path), run_two(NEVER, tmp_path)
    assert [w[0] for w in removed[0]["widths"]] == [4, 3, 3, 3]
    assert [w[3] for w in removed[0]["widths"]] == [13, 12, 10, 10]
    assert removed[0]["shapes"] == removed[1]["shapes"]
    assert removed[0]["values"] == removed[1]["values"]
    assert [w[0] for w in kept[0]["widths"]] == [6] * 4
    for one, other in zip(removed, kept, strict=True):
        difference = largest_difference(one["losses"], other["losses"])
        print(f"DDP: {difference:.2e}")
        assert difference < 1e-5
    assert removed[0]["losses"] != removed[1]["losses"]


if __name__ == "__main__":
    train_two(int(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.barrier()  # both have written what they end with
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is shutting down
