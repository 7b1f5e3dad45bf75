"""The command sweep: one script of LightningCLI at several sizes, resumed, and what is wrong with it."""

import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import yaml

from lightning_selfcompress.errors import RunError
from lightning_selfcompress.reporting.sweep_config import read_config, with_value

SCRIPT = """
import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from networks import Lit, batches


class Net(Lit):
    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 0.1 * self.trainer.current_epoch)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches(12, 4)

    def val_dataloader(self):
        return batches(1)


print("words of the script itself")
LightningCLI(Net, Data)
"""
COMMAND = ["python", "train.py", "fit", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]


class Processes:
    """Runs scripts in this process, counts them, and fails those that hold a word."""

    def __init__(self, monkeypatch):
        self.ran, self.failing, self.monkeypatch = [], "", monkeypatch

    def __call__(self, words, **kwargs):
        out = StringIO()
        with self.monkeypatch.context() as patched, redirect_stdout(out):
            patched.setattr(sys, "argv", list(words[1:]))
            try:
                if self.failing and any(self.failing in word for word in words):
                    raise SystemExit(3)
                runpy.run_path(words[1], run_name="__main__")
                status = 0
            except SystemExit as error:
                status = error.code or 0
        if "--print_config" not in words:
            self.ran.append(words[words.index("--config") + 1].split("/")[-2])
        return subprocess.CompletedProcess(words, status, out.getvalue(), "what went wrong\n" if status else "")


@pytest.fixture
def processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    ran = Processes(monkeypatch)
    monkeypatch.setattr("lightning_selfcompress.reporting.sweep.subprocess.run", ran)
    return ran


def test_sweep(said, processes, tmp_path):
    """Each value is a run in its own folder; a failed one is named, and the same command runs it alone."""
    command = ["sweep", "--target-size", "1500", "2KB", "--", *COMMAND, *QUIET]
    processes.failing = "2KB"
    status, lines, err = said(*command)
    assert status == 1
    assert err.splitlines()[-1].endswith("1 of 2 runs failed: target_size=2KB. The same command tries again.")
    assert processes.ran == ["target_size=1500", "target_size=2KB"]
    processes.failing, processes.ran = "", []
    status, lines, _ = said(*command)
    assert (status, processes.ran) == (0, ["target_size=2KB"])
    assert "target_size=1500 (1 of 2): done before" in lines
    table = [line.split() for line in lines if line.startswith("target_size=") and "%" in line]
    assert [row[0] for row in table] == ["target_size=1500", "target_size=2KB"]
    sizes = [int(next(word for word in row[1:] if word != "*").replace(",", "")) for row in table]
    assert sizes[0] <= 1500 < sizes[1] <= 2048
    assert lines[-1] == "sweep/sweep.html"
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert 'href="target_size%3D1500/report.html"' in page
    assert (tmp_path / "sweep" / "target_size=1500" / "report.html").exists()
    config = yaml.safe_load((tmp_path / "sweep" / "target_size=2KB" / "run.yaml").read_text())
    (compression, report) = config["trainer"]["callbacks"]
    assert compression["init_args"] == {"gamma": None, "target_size": "2KB"}
    assert report["init_args"]["path"] == "sweep/target_size=2KB/report.html"
    status, _, err = said(*command[:4], "--", *COMMAND, *QUIET, "--trainer.max_epochs=4")
    assert (status, err.count("\n")) == (1, 1)
    assert "Expected no run of other settings in 'sweep/target_size=1500'" in err


def test_an_interrupted_run_goes_on(said, processes, tmp_path):
    """A run that was stopped after a checkpoint goes on from it."""
    command = ["sweep", "--gamma", "0.1", "--", *COMMAND, *QUIET]
    assert said(*command)[0] == 0
    run = tmp_path / "sweep" / "gamma=0.1"
    (run / "done.json").unlink()
    (checkpoint,) = run.rglob("*.ckpt")
    status, lines, _ = said(*command)
    assert status == 0
    assert any(f"--ckpt_path sweep/gamma=0.1/{checkpoint.relative_to(run)}" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gamma", "0.1", "--", "python", "train.py"], "with its subcommand 'fit', got 'python train.py'"),
        (["--gamma", "0.1"], "the following arguments are required: -- COMMAND"),
        (["--gamma", "-1", "--", *COMMAND], "expected a finite gamma >= 0, got -1"),
        (["--target-size", "200%", "--", *COMMAND], "expected target_size in bytes"),
        (["--gamma", "0.1", "--target-size", "2%", "--", *COMMAND], "not allowed with argument --gamma"),
        (["--", *COMMAND], "one of the arguments --target-size --gamma is required"),
        (["--gamma", "0.1", "0.1", "--", *COMMAND], "Expected each value of gamma once, got 0.1, 0.1."),
        (["--gamma", "0.1", "--", *COMMAND, "--no.such=1"], "but it ended with status 2: what went wrong"),
        (["--gamma", "0.1", "--", "python", "other.py", "fit"], "Expected a script of LightningCLI, which prints its"),
    ],
)
def test_wrong_sweeps(said, processes, tmp_path, arguments, reason):
    """What cannot be swept is one line, and nothing is written."""
    (tmp_path / "other.py").write_text("print('nothing of the kind')\n")
    status, lines, err = said("sweep", *arguments)
    err = "\n".join(line for line in err.splitlines() if line.startswith("selfcompress"))
    assert (status, lines, err.count("\n")) == (1, [], 0)
    assert reason in err
    assert not (tmp_path / "sweep").exists()


def test_loggers_and_folders_of_the_user(tmp_path):
    """Loggers that write no files stay, and folders of checkpoints become the run's own."""
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "mine"}}
    saved = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "mine"}}
    ramp = {"class_path": "main.Ramp", "init_args": {"gamma": 0.1}}
    own = {"class_path": "lightning_selfcompress.SelfCompression", "init_args": {"gamma": ramp, "initial_bits": 6}}
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}
    config = {"trainer": {"logger": [csv, wandb], "callbacks": [own, saved]}, "model": {"lr": 0.1}}
    made = with_value(config, "target_size", "5%", tmp_path, package="pytorch_lightning")
    assert made["model"] == {"lr": 0.1}
    first, second = made["trainer"]["logger"]
    assert (first["class_path"], second) == ("pytorch_lightning.loggers.TensorBoardLogger", wandb)
    compression, checkpoint, _ = made["trainer"]["callbacks"]
    assert compression["init_args"] == {"gamma": None, "target_size": "5%", "initial_bits": 6}
    assert checkpoint["init_args"]["dirpath"] == str(tmp_path / "checkpoints")
    assert config["trainer"]["callbacks"][0]["init_args"]["gamma"] == ramp


def test_what_is_printed_before_the_configuration():
    """Words of the script before its configuration are passed over; the package of its Trainer is told."""
    assert read_config("words: 1\n# pytorch_lightning==2.6.6\ntrainer:\n  max_epochs: 1\n") == (
        {"trainer": {"max_epochs": 1}},
        "pytorch_lightning",
    )
    with pytest.raises(RunError, match="Expected a script of LightningCLI"):
        read_config("# lightning.pytorch==2.6.6\ntrainer: [\n")


@pytest.mark.nightly
def test_in_processes_of_its_own(said, tmp_path, monkeypatch):
    """As a user runs it: a process to ask for the configuration, and one for each run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    command = [sys.executable, *COMMAND[1:], *QUIET]
    status, lines, _ = said("sweep", "--gamma", "0.1", "--", *command)
    assert (status, lines[-1]) == (0, "sweep/sweep.html")
