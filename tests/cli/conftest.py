"""Checkpoints and packed files, and commands run where they are."""

import sys

import pytest
import torch
from fits import SCHEDULE, Kill
from networks import Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression, export, size_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints of one network, compressed and smaller, a float one, and packed files of the first."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.05), Kill(SCHEDULE), max_epochs=4)
    trainer.fit(model, batches(60, 4))
    trainer.save_checkpoint(folder / "net.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    export(model, folder / "net.scnn")
    export(model, folder / "half.scnn", floats=torch.float16)
    assert size_report(model).weights_left < 0.9
    trainer = make_trainer()
    trainer.fit(Lit(), batches(2))
    trainer.save_checkpoint(folder / "float.ckpt")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Commands are run where the files are."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
