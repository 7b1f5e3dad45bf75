"""CompressionReport in whole fits, and the same run reported from its folder."""

import base64
import json
import re

import pytest
import torch
from fits import Kill
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from networks import Lit, batches, make_trainer

from lightning_selfcompress import CompressionReport, ParetoCheckpoint, SelfCompression, size_report
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.reporting.page import REMOVED
from lightning_selfcompress.reporting.recording import Recording
from lightning_selfcompress.reporting.run_folder import read_run
from lightning_selfcompress.size.operations import uses_of


def fit(folder, *callbacks, epochs=3, n=60, ckpt_path=None, model=None, **kwargs):
    torch.manual_seed(1)
    report = CompressionReport(folder / "report.html")
    trainer = make_trainer(SelfCompression(gamma=0.05), report, Kill(), *callbacks, max_epochs=epochs, **kwargs)
    trainer.fit(model or Lit(), batches(n, 4), batches(2), ckpt_path=ckpt_path)
    return report, trainer


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def comparable(values):
    return {name: values[name] for name in ("nbytes", "values", "points", "front", "bits", "float_nbytes")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a logger, checkpoints and a report."""
    folder = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(folder, name="", version="")
    saved = ModelCheckpoint(folder / "saved", save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    pareto = ParetoCheckpoint("val_loss", mode="min", dirpath=folder / "front")
    _, trainer = fit(folder, pareto, saved, logger=logger, enable_checkpointing=True)
    return folder, trainer.lightning_module, pareto


def test_what_the_report_shows(run):
    """Its last size is the file's, its metric ParetoCheckpoint's, and removed channels are gaps where they were."""
    folder, model, pareto = run
    values = data_of(folder / "report.html")
    assert values["nbytes"][-1] == [180, size_report(model).nbytes]
    assert (values["metric"], values["mode"], len(values["values"])) == ("val_loss", "min", 3)
    assert [p[1] for p in values["front"]] == [p.metric for p in pareto.front]
    assert all(p[3].startswith("pareto-") for p in values["front"])
    layers = {layer["name"]: layer["frames"] for layer in values["bits"]["layers"]}
    first, last = (list(base64.b64decode(layers["net.4"][i])) for i in (0, -1))
    assert REMOVED not in first
    assert [i for i, code in enumerate(last) if code == REMOVED] == [0, 3, 7, 8, 9, 15]


def test_layers_before_and_after(run):
    """Multiply-accumulates are counted on a copy of a step: the first convolution is used at 36 positions."""
    folder, model, _ = run
    assert [round(uses_of(p)) for p in quantized_parameters(model)] == [36, 1, 1]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f'<td style="text-align:right">{54 * 36:,}</td>' in page
    assert "1 BatchNorm2d (&#x27;net.1&#x27;" in page


def test_the_folder_tells_the_same(run):
    """A run read from its folder has the bits, the metric, the front and the command that the callback recorded."""
    folder, model, pareto = run
    history = read_run(folder)
    values = data_of(folder / "report.html")
    assert [frame.step for frame in history.frames] == values["bits"]["steps"][
        1:
    ]  # no epoch ends before the first step
    assert (history.metric, history.mode) == ("val_loss", "min")
    assert [(p.nbytes, p.metric) for p in history.front] == [(p.nbytes, p.metric) for p in pareto.front]
    assert history.nbytes.values[-1] == size_report(model).nbytes
    assert history.before["net.0.weight"].macs == 54 * 36
    assert history.command


def test_resumed(run, tmp_path):
    """A fit that went on from a checkpoint reports the whole run, as one that was not stopped."""
    folder, _, _ = run
    pareto = ParetoCheckpoint("val_loss", mode="min", dirpath=tmp_path / "front")
    with pytest.warns(UserWarning, match="begins anew"):
        fit(tmp_path, pareto, ckpt_path=folder / "saved" / "epoch=0.ckpt", enable_checkpointing=True)
    whole, resumed = (comparable(data_of(path / "report.html")) for path in (folder, tmp_path))
    assert resumed["values"] == whole["values"]
    assert resumed["bits"] == whole["bits"]
    assert resumed["float_nbytes"] == whole["float_nbytes"]
    assert resumed["nbytes"][-1] == whole["nbytes"][-1]


def test_wrong_places(tmp_path):
    """A path that cannot be written, and a Trainer without compression, are refused before the first step."""
    (tmp_path / "file").write_text("")
    for path, error in (("file/report.html", OSError), (".", IsADirectoryError)):
        model = Lit()
        trainer = make_trainer(SelfCompression(gamma=0.1), CompressionReport(tmp_path / path))
        with pytest.raises(error):
            trainer.fit(model, batches(2))
        assert model.losses == []
    with pytest.raises(ValueError, match="Expected a SelfCompression among the Trainer's callbacks"):
        make_trainer(CompressionReport(tmp_path / "report.html")).fit(Lit(), batches(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_step_that_cannot_run_on_a_copy(tmp_path):
    """Where multiply-accumulates cannot be counted the report has none, and the fit goes on."""

    class OnlyOnce(Lit):
        def training_step(self, batch, batch_idx):
            if type(self) is not OnlyOnce:
                raise ArithmeticError("not on a copy")
            return super().training_step(batch, batch_idx)

    fit(tmp_path, epochs=1, n=4, model=OnlyOnce())
    assert "MACs" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_fits(tmp_path):
    """A callback that has reported one run reports the next one alone."""
    report = CompressionReport(tmp_path / "report.html")
    for epochs in (2, 1):
        trainer = make_trainer(SelfCompression(gamma=0.05), report, max_epochs=epochs)
        trainer.fit(Lit(), batches(4), batches(2))
    assert data_of(tmp_path / "report.html")["bits"]["steps"] == [0, 4]


def test_nothing_in_a_trial(tmp_path):
    """``fast_dev_run`` writes no report."""
    fit(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "report.html").exists()


def test_state_is_small(tmp_path):
    """The record in a checkpoint takes two bytes for each channel and epoch."""
    report, _ = fit(tmp_path, epochs=2, n=4)
    state = report.state_dict()["recording"]
    assert all(bits.dtype == torch.float16 for _, frame in state["frames"] for bits in frame.values())
    assert Recording.from_state(state).scalars == report._recording.scalars
