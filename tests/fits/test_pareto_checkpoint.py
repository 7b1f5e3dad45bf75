"""ParetoCheckpoint in whole fits: what it keeps, deletes, and finds again."""

import lightning.pytorch as pl
import pytest
import torch
from fits import Kill
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Lit, batches, make_trainer

from lightning_selfcompress import ParetoCheckpoint, SelfCompression, load_from_checkpoint, size_report
from lightning_selfcompress.reporting.front import beats

SCORES = [0.5, 0.7, 0.6, 0.8, 0.75]
SIZES = {0: 400, 1: 300, 2: 200, 3: 250, 4: 250}  # bytes by epoch


class Scored(Lit):
    """Logs a given score in each epoch."""

    def __init__(self, scores=SCORES):
        super().__init__()
        self.scores = scores

    def validation_step(self, batch, batch_idx):
        self.log("score", self.scores[self.trainer.current_epoch])


def fit(folder, *callbacks, epochs=5, n=6, ckpt_path=None, model=None, pareto=None, **kwargs):
    torch.manual_seed(1)
    pareto = pareto or ParetoCheckpoint("score", dirpath=folder / "front")
    model = model or Scored()
    settings = {"max_epochs": epochs, "enable_checkpointing": True} | kwargs
    trainer = make_trainer(SelfCompression(gamma=0.1), pareto, *callbacks, **settings)
    trainer.fit(model, batches(n, 4), batches(1), ckpt_path=ckpt_path)
    return pareto, trainer


@pytest.fixture
def sized(monkeypatch):
    """Has networks the bytes of their epoch, so that what beats what is known."""

    class Report:
        def __init__(self, module):
            self.nbytes = SIZES[module.trainer.current_epoch]

    monkeypatch.setattr("lightning_selfcompress.reporting.pareto_checkpoint.size_report", Report)


def names(folder):
    return sorted(path.name for path in (folder / "front").glob("*"))


def test_front(sized, tmp_path):
    """What is left on the disk is the front: each file that another one beats was deleted."""
    pareto, trainer = fit(tmp_path)
    assert [(p.metric, p.nbytes, p.step) for p in pareto.front] == [
        (pytest.approx(0.6), 200, 18),
        (pytest.approx(0.8), 250, 24),
    ]
    assert names(tmp_path) == ["pareto-epoch=2-step=18.ckpt", "pareto-epoch=3-step=24.ckpt"]
    assert [p.name for p in pareto.front] == [str(tmp_path / "front" / name) for name in names(tmp_path)]
    assert pareto.best_model_path == pareto.front[-1].name
    assert pareto.best_model_score == pytest.approx(0.8)
    assert trainer.checkpoint_callback is pareto


def test_each_file_is_its_network(tmp_path):
    """A file that is kept opens to a network of the bytes that were recorded for it, through removals."""
    killed = Kill({0: {"net.4": [0, 7]}, 1: {"net.4": [3]}})
    pareto, _ = fit(tmp_path, killed, epochs=2, n=60, model=Scored([0.3, 0.2]))
    assert len(pareto.front) >= 2
    for point in pareto.front:
        assert size_report(load_from_checkpoint(Scored, point.name)).nbytes == point.nbytes
    assert not any(beats(a, b, "max") for a in pareto.front for b in pareto.front)


@pytest.mark.case("Checkpoints", "ParetoCheckpoint beside ModelCheckpoint, resumed after epoch {stop}: the same front")
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed(sized, stop, tmp_path):
    """A fit that was stopped and resumed from ModelCheckpoint's file ends with the front of one that was not."""
    whole, _ = fit(tmp_path / "whole")
    last = ModelCheckpoint(tmp_path / "last", save_last=True, save_on_train_epoch_end=True)
    fit(tmp_path / "parts", last, epochs=stop)
    pareto, _ = fit(tmp_path / "parts", ckpt_path=tmp_path / "last" / "last.ckpt")
    assert [(p.metric, p.nbytes, p.step) for p in pareto.front] == [(p.metric, p.nbytes, p.step) for p in whole.front]
    assert names(tmp_path / "parts") == names(tmp_path / "whole")


def test_the_file_that_a_fit_went_on_from_stays(sized, tmp_path):
    """A checkpoint that is beaten is not deleted while it is what the fit went on from."""
    first, _ = fit(tmp_path, epochs=1)
    pareto, _ = fit(tmp_path, ckpt_path=first.front[0].name)
    assert first.front[0].name not in {p.name for p in pareto.front}
    assert "pareto-epoch=0-step=6.ckpt" in names(tmp_path)


def test_another_folder_begins_anew(sized, tmp_path):
    """Where the folder has changed, the files of the earlier fit are neither counted nor deleted."""
    first, _ = fit(tmp_path / "a", epochs=1)
    with pytest.warns(UserWarning, match="the front begins anew"):
        pareto, _ = fit(tmp_path / "b", epochs=2, ckpt_path=first.front[0].name)
    assert [p.step for p in pareto.front] == [12]
    assert names(tmp_path / "a") == ["pareto-epoch=0-step=6.ckpt"]


def test_files_that_are_gone(sized, tmp_path):
    """From an earlier checkpoint a fit goes on with the files that are still there."""
    last = ModelCheckpoint(tmp_path / "all", save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}")
    fit(tmp_path, last)
    with pytest.warns(UserWarning, match="1 of 1 checkpoints of the earlier fit are not in"):
        pareto, _ = fit(tmp_path, ckpt_path=tmp_path / "all" / "epoch=0.ckpt")
    assert [p.metric for p in pareto.front] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"val_check_interval": 0.5}, [3, 6, 9, 12]), ({"check_val_every_n_epoch": 2}, [12]), ({}, [6, 12])],
)
def test_when_it_saves(settings, steps, tmp_path):
    """A checkpoint is considered at each validation, wherever it comes."""
    pareto = ParetoCheckpoint("score", dirpath=tmp_path, filename="{step}")
    _, trainer = fit(tmp_path, pareto=pareto, epochs=2, model=Rising(), **settings)
    assert trainer.lightning_module.validated == len(steps)
    assert [int(point.name.partition("step=")[2].partition(".")[0]) for point in pareto.front][-1] == steps[-1]
    assert {p.step for p in pareto.front} <= {*steps, *(s - 1 for s in steps)}


class Rising(Lit):
    """Logs a score that is better at each validation."""

    validated = 0

    def validation_step(self, batch, batch_idx):
        self.validated += not self.trainer.sanity_checking
        self.log("score", float(self.validated))


def test_several_fronts_and_the_best(sized, tmp_path):
    """Two of them keep their own fronts, and ``ckpt_path="best"`` takes the first one's best file."""

    class Tested(Scored):
        def test_step(self, batch, batch_idx):
            self.log("step", float(self.trainer.global_step))

    small = ParetoCheckpoint("loss", mode="min", dirpath=tmp_path / "loss")
    pareto, trainer = fit(tmp_path, small, model=Tested(), epochs=4)
    assert small.state_key != pareto.state_key
    assert small.front
    trainer.test(dataloaders=batches(1), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == pareto.front[-1].name


def test_a_metric_that_is_not_logged(tmp_path):
    """The first validation names what there is instead."""
    with pytest.raises(
        ValueError, match=r"Expected a metric 'accuracy' that the module logs in validation, found .*'score"
    ):
        fit(tmp_path, pareto=ParetoCheckpoint("accuracy", dirpath=tmp_path))
    with pytest.raises(ValueError, match="Expected mode='max' or mode='min', got 'best'"):
        ParetoCheckpoint("accuracy", mode="best")


def test_nothing_is_saved_in_a_trial(tmp_path):
    """``fast_dev_run`` and the sanity check save nothing."""
    fit(tmp_path, epochs=1, fast_dev_run=True)
    fit(tmp_path, epochs=0, num_sanity_val_steps=1)
    assert not (tmp_path / "front").exists() or names(tmp_path) == []


def test_without_compression(tmp_path):
    """It needs no SelfCompression: a float network has bytes too."""
    pareto = ParetoCheckpoint("score", dirpath=tmp_path)
    trainer = make_trainer(pareto, enable_checkpointing=True, max_epochs=1)
    trainer.fit(Scored(), batches(2), batches(1))
    assert [p.nbytes for p in pareto.front] == [size_report(trainer.lightning_module).nbytes]
    assert isinstance(trainer.checkpoint_callback, pl.callbacks.Checkpoint)
