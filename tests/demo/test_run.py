"""The demo and its command, end to end on digits in a few epochs."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from lightning_selfcompress.cli.main import main
from lightning_selfcompress.demo.curve import read_scalar
from lightning_selfcompress.demo.networks import DigitsNet, LeNet5
from lightning_selfcompress.demo.run import TASKS, Settings, run_demo
from lightning_selfcompress.files.checkpoint import load_from_checkpoint
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.size.report import size_report


def test_networks_have_the_weights_they_claim():
    """LeNet-5 has 430,500 weights and the digits' network 52,768."""
    for make, weights in ((LeNet5, 430_500), (DigitsNet, 52_768)):
        model = make()
        convert(model)
        assert size_report(model).total.weights_before == weights


def test_demo_prints_both_accuracies_the_report_and_where_to_look(tmp_path, capsys):
    """The command exits with 0 and prints accuracies, report, curve and TensorBoard's folder; the files are there."""
    assert main(["demo", "--epochs", "3", "--gamma", "0.5", "--out", str(tmp_path), "--no-progress"]) == 0

    said = capsys.readouterr().out
    run = tmp_path / "digits-1"
    accuracies = [float(n) for n in re.findall(r"^(?:float|compressed): +([\d.]+)% of the test set", said, re.M)]
    assert len(accuracies) == 2
    assert min(accuracies) > 80
    assert "whole bits" in said
    assert f"tensorboard --logdir {run}" in said
    assert (run / "size_curve.png").stat().st_size > 10_000
    steps, bits = read_scalar(run / "compressed", "selfcompress/bits_per_weight")
    assert steps == sorted(steps)
    assert bits[-1] < bits[0] == pytest.approx(8, abs=0.3)
    outcome = json.loads((run / "compressed" / "outcome.json").read_text())
    assert f"{outcome['nbytes']:,} bytes" in said


def test_outcome_is_that_of_the_file(tmp_path):
    """The size reported is the one of the checkpoint, loaded into a fresh network."""
    outcomes = run_demo(Settings("digits", None, 2, 0.5, 0), tmp_path, progress=False)
    model = load_from_checkpoint(DigitsNet, outcomes["compressed"].checkpoint)
    assert size_report(model).nbytes == outcomes["compressed"].nbytes


def test_second_run_gets_a_folder_of_its_own(tmp_path):
    """Nothing of an earlier run is overwritten."""
    for n in (1, 2):
        assert main(["demo", "--epochs", "1", "--out", str(tmp_path), "--no-progress"]) == 0
        assert (tmp_path / f"digits-{n}" / "compressed" / "outcome.json").exists()


def test_interrupted_run_says_how_to_go_on_and_goes_on(tmp_path):
    """Ctrl-C ends with the command that resumes; resumed, the run ends as if it had not been interrupted."""
    command = [sys.executable, "-m", "lightning_selfcompress.cli", "demo", "--no-progress"]
    start = [*command, "--epochs", "20", "--gamma", "0.5", "--out", str(tmp_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell has its background jobs ignore it
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    last = tmp_path / "digits-1" / "compressed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)  # waits for an event in another process
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run ended before it could be interrupted")
    resume = f"selfcompress demo --resume {tmp_path / 'digits-1'}"
    assert process.returncode == 130
    assert resume in errors

    assert main(["demo", "--no-progress", *resume.split()[2:]]) == 0
    steps, _ = read_scalar(tmp_path / "digits-1" / "compressed", "val/accuracy")
    assert max(steps) == 20 * (1132 // TASKS["digits"].data(None).batch_size) - 1


def test_bad_input_is_one_line(tmp_path, capsys):
    """Missing data, a wrong gamma or a run that is not there: status 1, a line on stderr, nothing written."""
    out = tmp_path / "out"
    for arguments, said in (
        (["--data", "mnist", "--data-dir", str(tmp_path / "none")], "data folder at"),
        (["--gamma", "-1"], "gamma >= 0"),
        (["--resume", str(tmp_path / "none")], "run of the demo in"),
    ):
        assert main(["demo", "--no-progress", "--out", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    """Without the demo's packages the command says what to install, before it trains."""
    there = {"matplotlib": "a spec"}
    monkeypatch.setattr("lightning_selfcompress.cli.commands.find_spec", there.get)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "needs scikit-learn, pooch: pip install scikit-learn pooch." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_mnist_within_half_a_bit(mnist_folder, tmp_path):
    """LeNet-5 on full MNIST, 8 epochs: at least 98.5% at no more than 0.5 bits per weight."""
    settings = Settings("mnist", str(mnist_folder), 8, TASKS["mnist"].gamma, 0)
    outcome = run_demo(settings, tmp_path, progress=False)["compressed"]
    assert outcome.accuracy >= 98.5
    assert outcome.bits_per_weight <= 0.5


@pytest.mark.nightly
def test_digits_within_a_point_at_two_bits(tmp_path):
    """The default demo: within 1.0 point of float at no more than 2.0 bits per weight."""
    task = TASKS["digits"]
    outcomes = run_demo(Settings("digits", None, task.epochs, task.gamma, 0), tmp_path, progress=False)
    assert outcomes["compressed"].accuracy >= outcomes["float"].accuracy - 1.0
    assert outcomes["compressed"].bits_per_weight <= 2.0
