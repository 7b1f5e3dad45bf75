"""Channels that leave a network while a Trainer trains it."""

import csv

import pytest
from fits import (
    NEVER,
    SCHEDULE,
    Hold,
    Kill,
    Widths,
    assert_only_living,
    data,
    fit,
    largest_difference,
    make_trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks import Lit, batches

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.tensors import stored_tensors


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


def test_logs_what_is_left(tmp_path):
    """The share of weights left and the channels of each layer are logged, and are those of the network."""
    logger = CSVLogger(tmp_path, name="", version="")
    model, trainer = fit(1, logger=logger)
    report = size_report(model)
    metrics = trainer.callback_metrics
    assert metrics["selfcompress/weights_left"] == pytest.approx(report.weights_left)
    assert report.weights_left < 0.4
    assert metrics["selfcompress_channels/net.0"] == 3
    assert metrics["selfcompress_channels/net.4"] == 10
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["selfcompress_channels/net.4"]]
    assert [float(row["selfcompress_channels/net.4"]) for row in rows] == [13, 12, 10, 10]
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
