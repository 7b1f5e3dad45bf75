"""ModelCheckpoint beside SelfCompression: what it records is what the file holds."""

import itertools
from datetime import timedelta

import pytest
import torch
from fits import Kill
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from networks import Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression, load_from_checkpoint, size_report

TRAIN, VALIDATION = {"n": 60, "size": 4}, {"n": 3, "size": 8}


class Accurate(Lit):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def measure(path, metric):
    """The metric of a file, computed anew."""
    model = load_from_checkpoint(Accurate, path).eval()
    if metric == "selfcompress/nbytes":
        return size_report(model).nbytes
    if metric == "selfcompress/bits_per_weight":
        return size_report(model).bits_per_weight
    with torch.no_grad():
        seen = list(batches(**VALIDATION))
        if metric == "val_loss":
            return sum(model.loss(b).item() for b in seen) / len(seen)
        return sum((model.net(b[0]).argmax(1) == b[1]).float().mean().item() for b in seen) / len(seen)


def run(*callbacks, epochs=3, **kwargs):
    torch.manual_seed(1)
    model = Accurate()
    settings = {"max_epochs": epochs, "enable_checkpointing": True} | kwargs
    trainer = make_trainer(SelfCompression(gamma=0.05), Kill(), *callbacks, **settings)
    trainer.fit(model, batches(**TRAIN), batches(**VALIDATION))
    assert model.net[0].out_channels < 6
    return model, trainer


TIMINGS = {
    "after validation": {},
    "at each epoch's end": {"save_on_train_epoch_end": True},
    "every 2 epochs": {"every_n_epochs": 2},
    "every 7 steps": {"every_n_train_steps": 7},
    "by time": {"train_time_interval": timedelta(microseconds=1)},
}
METRICS = ["val_loss", "accuracy", "selfcompress/nbytes", "selfcompress/bits_per_weight"]


@pytest.mark.case("Checkpoints", "ModelCheckpoint {timing}, monitor={metric}: the file is what the metric says")
@pytest.mark.parametrize(
    ("timing", "metric"),
    [
        (timing, metric)
        for timing, metric in itertools.product(TIMINGS, METRICS)
        # between epochs a validation metric is as of the last validation, with or without compression
        if metric.startswith("selfcompress") or timing not in ("every 7 steps", "by time")
    ],
)
def test_metric_is_that_of_the_file(timing, metric, tmp_path):
    """Every file that is kept has the metric that was recorded for it."""
    mode = "max" if metric == "accuracy" else "min"
    saved = ModelCheckpoint(
        tmp_path, monitor=metric, mode=mode, save_top_k=-1, filename="{epoch}-{step}", **TIMINGS[timing]
    )
    run(saved)
    assert len(saved.best_k_models) >= (1 if timing == "every 2 epochs" else 3)
    for path, recorded in list(saved.best_k_models.items())[-8:]:
        assert measure(path, metric) == pytest.approx(recorded.item(), rel=1e-6)


@pytest.mark.case("Checkpoints", "ModelCheckpoint(save_weights_only=True)")
def test_weights_only(tmp_path):
    """A file of weights alone opens to the network that was saved."""
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    run(saved)
    assert measure(saved.best_model_path, "val_loss") == pytest.approx(saved.best_model_score.item(), rel=1e-6)


@pytest.mark.case("Checkpoints", "ModelCheckpoint(save_last=True, save_top_k=2)")
def test_last_and_top(tmp_path):
    """The best two and the last are kept, the last is the network in memory."""
    saved = ModelCheckpoint(tmp_path, monitor="selfcompress/nbytes", save_last=True, save_top_k=2)
    model, _ = run(saved)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert measure(saved.last_model_path, "selfcompress/nbytes") == size_report(model).nbytes
    assert saved.best_model_score.item() == measure(saved.best_model_path, "selfcompress/nbytes")


@pytest.mark.case("Checkpoints", "two ModelCheckpoints, on accuracy and on size")
def test_two_checkpoints(tmp_path):
    """Each keeps its own best."""
    kept = [
        ModelCheckpoint(tmp_path / str(i), monitor=m, mode=mode)
        for i, (m, mode) in enumerate((("accuracy", "max"), ("selfcompress/nbytes", "min")))
    ]
    run(*kept)
    for checkpoint in kept:
        assert measure(checkpoint.best_model_path, checkpoint.monitor) == pytest.approx(
            checkpoint.best_model_score.item(), rel=1e-6
        )


@pytest.mark.case("Checkpoints", "OnExceptionCheckpoint")
def test_checkpoint_on_exception(tmp_path):
    """What is saved when training breaks off opens to the network as it was."""

    class Failing(Accurate):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.current_epoch == 1 and batch_idx == 30:
                raise ArithmeticError("no luck")

    model = Failing()
    saved = OnExceptionCheckpoint(tmp_path, filename="broken")
    trainer = make_trainer(SelfCompression(gamma=0.05), Kill(), saved, max_epochs=2, enable_checkpointing=True)
    with pytest.raises(ArithmeticError):
        trainer.fit(model, batches(**TRAIN))
    opened = load_from_checkpoint(Failing, tmp_path / "broken.ckpt")
    assert opened.net[0].out_channels == model.net[0].out_channels == 4
    assert torch.equal(opened.net[0].weight, model.net[0].weight)


@pytest.mark.case("Checkpoints", "everything in a checkpoint loads with weights_only=True")
def test_no_classes_in_the_file(tmp_path):
    """No pickled class of ours: torch's safe loader takes the whole file."""
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    run(saved, EarlyStopping("selfcompress/nbytes"))
    checkpoint = torch.load(saved.last_model_path, weights_only=True)
    parts = {"depth_optimizers", "skipped_steps", "removal", "budget", "teacher", "monitor"}
    assert set(checkpoint["callbacks"]["SelfCompression"]) == parts
