"""The command report: one file about a run, or one line about what is wrong."""

import json
import re

import pytest
import torch
from fits import Kill
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression, size_report


class Shown(Lit):
    """Tells an example of its input."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two loggers and a checkpoint, and without a report of its own."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = Shown()
    loggers = [TensorBoardLogger(folder, "tensorboard", ""), CSVLogger(folder, "csv", "")]
    saved = ModelCheckpoint(folder / "tensorboard", "net", save_on_train_epoch_end=True)
    settings = {"logger": loggers, "max_epochs": 2, "enable_checkpointing": True}
    trainer = make_trainer(SelfCompression(gamma=0.05), Kill(), saved, **settings)
    trainer.fit(model, batches(60, 4), batches(2))
    return folder, model


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def test_report(run, said, tmp_path):
    """The layers are those of the last checkpoint; what they were before, the class tells."""
    folder, model = run
    out = tmp_path / "report.html"
    status, lines, err = said("report", folder / "tensorboard", "-o", out)
    assert (status, lines, err) == (0, [f"{out}: 3 layers, bits at 2 epochs"], "")
    text = out.read_text(encoding="utf-8")
    assert data_of(out)["nbytes"][-1] == [120, size_report(model).nbytes]
    assert "float B" not in text
    assert "The layers are those of net.ckpt, step 120. How large they were before, --model" in text
    assert f"from {size_report(model).float_nbytes:,} bytes in float" in text
    assert said("report", folder / "tensorboard", "-o", out, "--model", "networks:Lit")[0] == 0
    with_class = out.read_text(encoding="utf-8")
    assert "float B" in with_class
    assert "1 BatchNorm2d (&#x27;net.1&#x27;" in with_class


def test_multiply_accumulates(run, said, tmp_path, monkeypatch):
    """They are counted where the class has an example of its input."""
    folder, _ = run
    monkeypatch.setattr("networks.Shown", Shown, raising=False)
    out = tmp_path / "report.html"
    assert said("report", folder / "tensorboard", "-o", out, "--model", "networks:Shown")[0] == 0
    assert f">{54 * 36:,}<" in out.read_text(encoding="utf-8")


def test_report_of_a_csv_file(run, said, tmp_path):
    """What a CSVLogger has is enough for the curves; a checkpoint elsewhere is named."""
    folder, model = run
    out = tmp_path / "report.html"
    command = ["report", folder / "csv", "-o", out, "--metric", "val_loss", "--mode", "min"]
    assert said(*command)[0] == 0
    values = data_of(out)
    assert values["nbytes"][-1] == [120, size_report(model).nbytes]
    assert (values["metric"], len(values["points"]), values["bits"]["steps"]) == ("val_loss", 2, [])
    status, lines, _ = said(*command, "--checkpoint", folder / "tensorboard" / "net.ckpt")
    assert (status, lines) == (0, [f"{out}: 3 layers, bits at 0 epochs"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "-o", "never.html"], "Expected the folder of a run, got 'nowhere', which is none."),
        (["empty", "-o", "never.html"], "found neither TensorBoard's event files nor a metrics.csv in it or below."),
        (["RUN", "-o", "no/never.html"], "'no/never.html' to be a file that can be used: There is no folder for this"),
        (["RUN", "-o", "empty"], "'empty' to be a file that can be used: Expected a path for a file, this is a folder"),
        (["RUN", "-o", "never.html", "--metric", "acc"], "Give one of these to --metric."),
        (["RUN", "-o", "never.html", "--mode", "best"], "argument --mode: invalid choice: 'best'"),
        (["RUN/csv", "-o", "never.html", "--model", "networks:Lit"], "Name one with --checkpoint."),
        (["RUN/tensorboard", "-o", "never.html", "--model", "networks:Gan"], "to be of a Gan with the same arguments."),
        (["RUN/csv", "-o", "never.html", "--checkpoint", "gone.ckpt"], "No such file or directory"),
        (["RUN"], "the following arguments are required: -o/--out"),
        (["damaged", "-o", "never.html"], "found a damaged record after 0 good ones. Take another copy"),
        (["RUN-above", "-o", "never.html"], "found 2: csv, tensorboard. Name one of them."),
    ],
)
def test_wrong_reports(run, said, tmp_path, monkeypatch, arguments, reason):
    """What cannot be reported is one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    folder, _ = run
    (events,) = (folder / "tensorboard").glob("events*")
    content = bytearray(events.read_bytes())
    content[60:70] = b"xxxxxxxxxx"
    (tmp_path / "damaged" / events.name).write_bytes(content)
    first, *rest = arguments
    first = str(folder) if first == "RUN-above" else first.replace("RUN", str(folder / "tensorboard"), 1)
    first = first.replace("tensorboard/csv", "csv").replace("tensorboard/tensorboard", "tensorboard")
    status, lines, err = said("report", first, *rest)
    assert (status, lines, err.count("\n")) == (1, [], 1)
    assert reason in err, err
    assert not list(tmp_path.rglob("never*"))


def test_a_checkpoint_that_cannot_be_read(run, said, tmp_path):
    """The curves are reported without the layers, and this is said."""
    folder, _ = run
    (tmp_path / "bad.ckpt").write_bytes((folder / "tensorboard" / "net.ckpt").read_bytes()[:-500])
    command = ["report", folder / "tensorboard", "-o", tmp_path / "r.html", "--checkpoint", tmp_path / "bad.ckpt"]
    status, _, err = said(*command)
    assert (status, err.count("\n")) == (0, 1)
    assert "The layers are left out: Expected a checkpoint in" in err
    assert "section-layers" not in (tmp_path / "r.html").read_text(encoding="utf-8")
