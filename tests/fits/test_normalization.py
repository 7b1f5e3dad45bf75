"""Batch normalization while a Trainer runs: validation sees the statistics of the network that is validated."""

import copy

import pytest
import torch
from fits import data
from networks import Lit, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression, recalibrate
from lightning_selfcompress.training.normalization import Normalization


class Watched(Lit):
    """Keeps its batches of an epoch, and its statistics at each validation."""

    def __init__(self):
        super().__init__()
        self.batches, self.seen = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.batches.clear()

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            expected = copy.deepcopy(self.net)
            recalibrate(expected, self.batches[-16:])
            self.seen.append((self.net[1].running_mean.clone(), expected[1].running_mean))


def fit(model, *callbacks, **settings):
    torch.manual_seed(1)
    compression = SelfCompression(gamma=1.0, bits_lr=0.05)
    trainer = make_trainer(compression, *callbacks, max_epochs=2, **settings)
    trainer.fit(model, data(torch.float32), data(torch.float32, 2))
    return trainer


def test_validation_sees_the_statistics_of_its_network():
    """At each validation they are the average over the last 16 batches, run through the network as it is."""
    model = Watched()
    fit(model)
    assert len(model.seen) == 2
    for mean, expected in model.seen:
        assert torch.allclose(mean, expected, atol=1e-6)


def test_training_is_the_same(monkeypatch):
    """Weights, depths and losses are those of a training without the estimate, to the bit."""
    one = Lit()
    two = copy.deepcopy(one)
    fit(one)
    monkeypatch.setattr(Normalization, "refresh", lambda *_: None)
    fit(two)
    assert one.losses == two.losses
    for p, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, other)
    assert not torch.equal(one.net[1].running_var, two.net[1].running_var)


def test_frozen_statistics_stay():
    """Layers that normalize as in evaluation while training keep the statistics that they have."""

    class Frozen(Lit):
        def on_train_epoch_start(self):
            self.net[1].eval()

    model = Frozen()
    before = model.net[1].running_mean.clone()
    fit(model)
    assert torch.equal(model.net[1].running_mean, before)


@pytest.mark.parametrize("how", ["in place", "raising"])
def test_batches_that_cannot_be_run_again(how):
    """Where steps write into their batches, or raise on a copy, the statistics stay; the latter is told once."""

    class Odd(Lit):
        def training_step(self, batch, batch_idx):
            if how == "in place":
                batch[0].mul_(0.5)
            elif type(self).__name__ != "Odd":
                raise ArithmeticError("not on a copy")
            return super().training_step(batch, batch_idx)

    model = Odd()
    if how == "raising":
        with pytest.warns(UserWarning, match=r"ArithmeticError: not on a copy.*recalibrate\(model, loader\)"):
            fit(model)
    else:
        fit(model)
    assert torch.isfinite(model.net[1].running_mean).all()
    assert int(model.net[1].num_batches_tracked) == 120


def test_all_kinds_of_layers_are_refreshed():
    """Layers of one and three dimensions are refreshed too, and those without statistics are passed over."""

    class Mixed(Lit):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.InstanceNorm2d(4),
                nn.Flatten(),
                nn.Linear(144, 8),
                nn.BatchNorm1d(8),
                nn.ReLU(),
                nn.BatchNorm1d(8, track_running_stats=False),
                nn.Linear(8, 4),
            )

    model = Mixed()
    trainer = fit(model)
    images = [x for x, _ in data(torch.float32)][-16:]
    expected = copy.deepcopy(model.net)
    recalibrate(expected, images)
    assert trainer.current_epoch == 2
    assert torch.allclose(model.net[4].running_mean, expected[4].running_mean, atol=1e-5)
