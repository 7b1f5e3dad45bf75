"""Trainings that go on from a checkpoint, in a fresh module, as if they had never stopped."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Gan, Lit, batches, make_trainer
from test_removal_fit import GAN, SCHEDULE, Kill

from lightning_selfcompress import SelfCompression

EPOCHS = 3


class Resumable:
    """A loader that shuffles, and goes on in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    def __init__(self, n=60, size=4):
        self.batches = list(batches(n, size))
        self.epoch, self.position = 0, 0
        self.sampler = self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for i in range(self.position % len(self), len(self)):
            self.position = i + 1
            yield self.batches[order[i]]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def train(folder, *callbacks, make=Lit, schedule=SCHEDULE, ckpt_path=None, compression=None, **kwargs):
    torch.manual_seed(1)
    model = make()
    saved = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **kwargs.pop("save", {}))
    compression = compression or SelfCompression(gamma=0.05, cooldown=0.5)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True} | kwargs
    trainer = make_trainer(compression, Kill(schedule), saved, *callbacks, **settings)
    trainer.fit(model, Resumable(), batches(2), ckpt_path=ckpt_path)
    return model, trainer


def assert_same(model, whole):
    """Shapes, parameters, depths: all equal to the bit."""
    mine, theirs = model.state_dict(), whole.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


TIMINGS = {
    "each epoch's end": {"save_on_train_epoch_end": True},
    "each validation's end": {"save_on_train_epoch_end": False},
    "every 25th step": {"every_n_train_steps": 25},
}


@pytest.mark.case("Checkpoints", "fit(ckpt_path=) into a fresh module, saved at {timing}: equal to the bit")
@pytest.mark.parametrize("timing", TIMINGS)
def test_resumed_equals_uninterrupted(timing, tmp_path):
    """From each checkpoint of a run a fresh module goes on with the same losses and ends as the same network."""
    whole, _ = train(tmp_path / "whole", save=TIMINGS[timing])
    assert whole.net[0].out_channels == 3
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    assert len(checkpoints) >= EPOCHS
    for path in checkpoints[:-1]:
        step = int(path.stem.split("step=")[1])
        model, _ = train(tmp_path / path.stem, ckpt_path=path)
        assert model.losses == whole.losses[step:], path
        assert_same(model, whole)
