"""A size to end at: whatever the training, the file is at or just under it, and the network validated is the file's."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from fits import data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from networks import Gan, Lit, batches, make_trainer
from resumable import Resumable

from lightning_selfcompress import SelfCompression, export, load, size_report
from lightning_selfcompress.quantize.parameters import quantized_parameters

FLOAT = 15_028  # bytes of the float network


def train(target, *callbacks, make=Lit, ckpt_path=None, train_data=None, val=None, seed=1, price="bytes", **settings):
    torch.manual_seed(seed)
    model = make()
    compression = SelfCompression(target_size=target, price=price)
    trainer = make_trainer(compression, *callbacks, **({"max_epochs": 3} | settings))
    loader = data(torch.float32) if train_data is None else train_data
    trainer.fit(model, loader, batches(4) if val is None else val, ckpt_path=ckpt_path)
    return model, trainer


def nbytes(model, path):
    """The bytes of the file that is written, loaded back with the same outputs."""
    images = torch.randn(3, 1, 8, 8)
    size = export(model, path / "net.scnn")
    assert size == size_report(model).nbytes == (path / "net.scnn").stat().st_size
    plain = load(path / "net.scnn", into=type(model)()).eval()
    assert torch.equal(plain.net(images), model.eval().net(images))
    return size


@pytest.mark.parametrize("price", ["bytes", "bits"])
@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.06])
def test_ends_within_the_target(share, price, tmp_path):
    """Three short epochs end at or under the target, and not far under it, by whichever price."""
    target = int(FLOAT * share)
    model, _ = train(f"{100 * share:g}%", price=price)
    size = nbytes(model, tmp_path)
    assert size <= target
    if share < 0.25:  # a network of 8 bits has a quarter of the float network's bytes to begin with
        assert size >= 0.85 * target


@pytest.mark.parametrize(
    "settings", [{"max_steps": 130, "max_epochs": -1}, {"max_epochs": 5}, {"val_check_interval": 20}]
)
def test_whatever_ends_the_training(settings, tmp_path):
    """Steps, epochs and validations within epochs: the end is known, and the size is reached there."""
    model, _ = train(1500, **settings)
    assert 0.9 * 1500 <= nbytes(model, tmp_path) <= 1500


def test_stopped_early(tmp_path):
    """A training that another callback ends before its time lands as well."""
    stop = EarlyStopping("selfcompress/nbytes", mode="max", patience=1)
    model, trainer = train(1500, stop, max_epochs=30)
    assert trainer.current_epoch < 10
    assert nbytes(model, tmp_path) <= 1500


class Validated(pl.Callback):
    """Keeps the network of the last validation, and what ModelCheckpoint may monitor then."""

    def on_validation_end(self, trainer, pl_module):
        self.state = {name: t.clone() for name, t in pl_module.state_dict().items()}
        self.known = dict(trainer.callback_metrics)


def test_the_network_validated_is_the_network_in_the_file(tmp_path):
    """The landing comes before the last validation and the last checkpoint."""
    seen, saved = Validated(), ModelCheckpoint(tmp_path, save_last=True)
    model, trainer = train(1500, seen, saved, enable_checkpointing=True)
    size = nbytes(model, tmp_path)
    assert size <= 1500
    assert seen.known["selfcompress/nbytes"] >= size
    assert seen.known["selfcompress/target"] == 1500
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    before = trainer.callback_metrics["val_loss"]
    (after,) = trainer.validate(model, batches(4), verbose=False)
    assert after["val_loss"] == pytest.approx(float(before), rel=1e-5)


@pytest.mark.parametrize("moment", [{"every_n_epochs": 1}, {"every_n_train_steps": 25}])
def test_resumed_ends_with_the_same_file(moment, tmp_path):
    """From each checkpoint a fresh module goes on to the same file, to the byte."""
    save = ModelCheckpoint(tmp_path / "a", save_top_k=-1, **moment)
    whole, _ = train(1500, save, train_data=Resumable(), enable_checkpointing=True)
    export(whole, tmp_path / "whole.scnn")
    checkpoints = sorted((tmp_path / "a").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))[:-1]
    assert len(checkpoints) >= 2
    for path in checkpoints[:: max(1, len(checkpoints) // 3)]:
        model, _ = train(1500, train_data=Resumable(), ckpt_path=path, seed=5)
        export(model, tmp_path / "resumed.scnn")
        assert (tmp_path / "resumed.scnn").read_bytes() == (tmp_path / "whole.scnn").read_bytes(), path


def test_says_what_is_possible(caplog):
    """Before the first step the smallest and the largest size are printed, and at the end what was moved."""
    with caplog.at_level(logging.INFO):
        train(1500)
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "a target of 1,500 bytes" in text
    assert "This network can have" in text
    assert "codes moved" in text


def test_an_impossible_target_is_refused():
    """A target below the smallest possible size is refused before any weight has moved, with that size."""
    torch.manual_seed(1)
    model = Lit()
    start = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"at least (\d+) bytes, got 40") as caught:
        make_trainer(SelfCompression(target_size=40), max_epochs=3).fit(model, data(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    smallest = int(str(caught.value).split("at least ")[1].split()[0])
    model, _ = train(smallest + 60, max_epochs=6)
    assert size_report(model).nbytes <= smallest + 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epochs": 2}, "at least 3 epochs"),
        ({"max_epochs": -1, "max_steps": 20}, "at least 3 epochs or 100 steps"),
        ({"max_epochs": -1}, "known end"),
    ],
)
def test_a_training_without_time_is_refused(settings, message):
    """A size needs an end that is known, and time to get there."""
    with pytest.raises(ValueError, match=message):
        train(1500, **settings)


class LitGan(Gan):
    """Two optimizers, stepped by hand."""


def test_several_optimizers(tmp_path):
    """Under manual optimization with two optimizers the whole network is within its size."""
    torch.manual_seed(1)
    model = LitGan()
    trainer = make_trainer(SelfCompression(target_size="10%"), max_epochs=3)
    trainer.fit(model, data(torch.float32))
    report = size_report(model)
    assert report.nbytes <= 0.1 * report.float_nbytes


def test_codes_are_finite_numbers_of_steps():
    """What was moved in the landing are whole numbers of steps, so that training may go on from there."""
    model, _ = train(1200)
    for p in quantized_parameters(model):
        value, known = p.quantized()
        codes = value * known.inverse
        torch.testing.assert_close(codes, codes.round(), rtol=1e-5, atol=0)
