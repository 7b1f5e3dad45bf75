"""The Trainer's options, its loggers and its kinds of data beside SelfCompression, in fits where channels leave."""

import csv
from types import SimpleNamespace

import pytest
import torch
from compressing import Classifier, assert_shrunk, compress
from fits import data
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import CombinedLoader
from networks import batches
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset

from lightning_selfcompress import size_report
from lightning_selfcompress.quantize.parameters import quantized_parameters


@pytest.fixture(scope="module")
def alone():
    """Losses of the fit without any option."""
    return compress()[0].losses


@pytest.fixture(autouse=True)
def undo_determinism():
    yield
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)


NEUTRAL = {
    "detect_anomaly=True": {"detect_anomaly": True},
    "deterministic=True": {"deterministic": True},
    "profiler='simple'": {"profiler": "simple"},
    "barebones=True": {"barebones": True},
    "min_epochs=2": {"min_epochs": 2, "max_epochs": None, "max_steps": 120},
    "max_time, not reached": {"max_time": "00:01:00:00"},
    "val_check_interval=0.5": {"val_check_interval": 0.5},
    "val_check_interval=7, across epochs": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    "check_val_every_n_epoch=2": {"check_val_every_n_epoch": 2},
    "num_sanity_val_steps=-1": {"num_sanity_val_steps": -1},
    "limit_val_batches=0": {"limit_val_batches": 0},
    "inference_mode=False": {"inference_mode": False},
    "reload_dataloaders_every_n_epochs=1": {"reload_dataloaders_every_n_epochs": 1},
    "use_distributed_sampler=False": {"use_distributed_sampler": False},
    "sync_batchnorm=True": {"sync_batchnorm": True},
    "plugins, a cluster environment": {"plugins": [LightningEnvironment()]},
    "enable_model_summary=True": {"enable_model_summary": True},
    "enable_progress_bar=True": {"enable_progress_bar": True},
}


@pytest.mark.case("Trainer options", "{name}")
@pytest.mark.parametrize("name", NEUTRAL)
def test_options_that_change_no_training(name, alone):
    """The same channels leave, and all losses are those of the fit without the option, to the bit."""
    model, trainer = compress(val=batches(2), make=Classifier, **NEUTRAL[name])
    assert_shrunk(model, trainer)
    assert model.losses == alone


@pytest.mark.case("Trainer options", "fast_dev_run={value}")
@pytest.mark.parametrize("value", [True, 3])
def test_fast_dev_run(value):
    """A trial run takes its few steps, and depths move."""
    model, trainer = compress(val=batches(2), make=Classifier, fast_dev_run=value)
    assert len(model.losses) == int(value)
    assert_shrunk(model, trainer, channels=6, hidden=16)  # dead, but they have not faded yet
    assert size_report(model).channels == 26 - 5
    assert trainer.callback_metrics["selfcompress_channels/total"] == 26 - 5


@pytest.mark.case("Trainer options", "overfit_batches={value}")
@pytest.mark.parametrize(("value", "steps"), [(1, 1), (0.5, 30)])
def test_overfit_batches(value, steps):
    """Channels leave in a fit on a few batches, once they had the steps to fade."""
    epochs = 120 // steps
    model, trainer = compress(val=batches(2), overfit_batches=value, max_epochs=epochs, schedule={0: {"net.0": [1, 4]}})
    assert len(model.losses) == 120
    assert_shrunk(model, trainer, channels=4, hidden=16)


@pytest.mark.case("Trainer options", "limit_train_batches={value}")
@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.9, 54), (52, 52)])
def test_limit_train_batches(value, steps):
    """An epoch of fewer batches compresses; one of none leaves a network that computes as before."""
    model, trainer = compress(limit_train_batches=value, make=Classifier)
    assert len(model.losses) == 2 * steps
    if steps:
        assert_shrunk(model, trainer)
    else:
        assert all(bool((p.raw_depth == 8).all()) for p in quantized_parameters(model))
        assert len(trainer.predict(model, batches(2))) == 2


@pytest.mark.case("Trainer options", "max_steps, within an epoch")
def test_max_steps():
    """Training ends at the step it shall, with the removals until then."""
    model, trainer = compress(max_epochs=-1, max_steps=70)
    assert (len(model.losses), trainer.global_step) == (70, 70)
    assert_shrunk(model, trainer, channels=4, hidden=13)
    assert trainer.callback_metrics["selfcompress/nbytes"] == size_report(model).nbytes


@pytest.mark.case("Trainer options", "max_time, reached")
def test_max_time():
    """Training that the clock ends leaves a network in order."""
    model, trainer = compress(max_epochs=-1, max_time={"milliseconds": 300})
    assert trainer.should_stop
    assert len(model.losses) == trainer.global_step > 0
    assert model.net(next(iter(batches()))[0]).isfinite().all()


@pytest.mark.case("Trainer options", "gradient_clip_val, algorithm {algorithm}")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm):
    """Clipped gradients of weights do not hold depths up: bits fall as without clipping."""
    model, trainer = compress(gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    assert_shrunk(model, trainer)
    assert size_report(model).bits_per_weight < 5


class Endless(IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        yield from data(torch.float32)


class Two(Classifier):
    """Takes batches of a dict with two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["one"], batch_idx) + 0.1 * self.loss(batch["other"])


class Fetching(Classifier):
    """Takes the iterator instead of a batch."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss


@pytest.mark.case("Trainer options", "an IterableDataset without length")
def test_data_without_length():
    """Where the length of an epoch is not known in advance, channels leave at its end all the same."""
    model, trainer = compress(train=DataLoader(Endless(), batch_size=None))
    assert len(model.losses) == 120
    assert_shrunk(model, trainer)


@pytest.mark.case("Trainer options", "training data from {kind}")
@pytest.mark.parametrize("kind", ["a dict of loaders", "a CombinedLoader"])
def test_several_loaders(kind):
    """A step on batches of several loaders is watched and repeated like any other."""
    loaders = {"one": data(torch.float32), "other": batches(7, 4)}
    train = loaders if kind == "a dict of loaders" else CombinedLoader(loaders, "max_size_cycle")
    if kind == "a dict of loaders":
        train = {"one": loaders["one"], "other": data(torch.float32)}
    assert_shrunk(*compress(make=Two, train=train))


@pytest.mark.case("Trainer options", "training_step(dataloader_iter): depths are learned, no channels are removed")
def test_step_that_takes_the_iterator(caplog):
    """A step that fetches its batches cannot be repeated to prove a removal: that is said, and nothing is removed."""
    with caplog.at_level("INFO"):
        model, trainer = compress(make=Fetching)
    assert len(model.losses) == 120
    assert_shrunk(model, trainer, channels=6, hidden=16)
    assert size_report(model).channels == 26 - 7
    assert "training_step takes an iterator over batches, which cannot be repeated" in caplog.text


class Plain(Logger):
    """A logger of one's own, with no experiment at all."""

    name, version = "plain", 0

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_hyperparams(self, *_):
        """Keeps none."""


class WithoutHistograms(Plain):
    """A logger with an experiment that takes no histograms."""

    experiment = SimpleNamespace()


def read_csv(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return [float(row["selfcompress/nbytes"]) for row in csv.DictReader(file) if row["selfcompress/nbytes"]]


def read_tensorboard(folder):
    events = EventAccumulator(str(next(folder.rglob("events*")).parent), {"scalars": 0, "histograms": 0}).Reload()
    assert len(events.Histograms("selfcompress_depths/histogram")) == 2
    points = dict.fromkeys((e.step, e.value) for e in events.Scalars("selfcompress/nbytes"))
    return [value for _, value in points]  # what is logged with hyperparameters is a point that is there already


LOGGERS = {
    "CSVLogger": lambda folder: CSVLogger(folder),
    "TensorBoardLogger": lambda folder: TensorBoardLogger(folder),
    "the default logger": lambda folder: True,
    "no logger": lambda folder: False,
    "CSVLogger and TensorBoardLogger": lambda folder: [CSVLogger(folder), TensorBoardLogger(folder)],
    "a logger without experiment": lambda folder: Plain(),
    "a logger without add_histogram": lambda folder: WithoutHistograms(),
}


@pytest.mark.case("Loggers", "{name}")
@pytest.mark.parametrize("name", LOGGERS)
def test_loggers(name, tmp_path, alone):
    """Every logger gets the sizes of the network as it shrinks; no loss changes."""
    logger = LOGGERS[name](tmp_path)
    model, trainer = compress(logger=logger, default_root_dir=tmp_path, log_every_n_steps=10)
    assert_shrunk(model, trainer)
    assert model.losses == alone
    nbytes = float(size_report(model).nbytes)
    assert trainer.callback_metrics["selfcompress/nbytes"] == nbytes
    curves = []
    if "CSV" in name:
        curves.append(read_csv(tmp_path))
    if "TensorBoard" in name or "default" in name:
        curves.append(read_tensorboard(tmp_path))
    if isinstance(logger, Plain):
        curves.append([m["selfcompress/nbytes"] for m in logger.metrics if "selfcompress/nbytes" in m])
    assert len(curves) == (len(logger) if isinstance(logger, list) else int(name != "no logger"))
    for curve in curves:
        assert len(curve) == 12 + 2
        assert (curve[0] > 3000, curve[-1]) == (True, nbytes)
