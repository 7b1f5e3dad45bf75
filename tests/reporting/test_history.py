"""The record of a run: what its points are, and which scalar is taken for the metric."""

import pytest
import torch

from lightning_selfcompress.reporting.front import Point
from lightning_selfcompress.reporting.history import (
    NBYTES,
    BitsFrame,
    RunHistory,
    Series,
    guess_metric,
    guess_mode,
    thinned,
)
from lightning_selfcompress.reporting.recording import MOST_FRAMES, MOST_POINTS, Recording, command_of


def test_points_of_a_run():
    """A validation's bytes are those after the removal that is logged one step later, and files keep their names."""
    scalars = {NBYTES: Series((0, 10, 20), (900.0, 500.0, 400.0)), "acc": Series((9, 19), (0.5, 0.6))}
    history = RunHistory("run", scalars, metric="acc", kept=(Point(0.6, 400, 20, "b.ckpt"),))
    assert history.points == (Point(0.5, 500, 9), Point(0.6, 400, 20, "b.ckpt"))
    assert history.front == (Point(0.6, 400, 20, "b.ckpt"),)


@pytest.mark.parametrize(
    ("tags", "metric"),
    [
        (["val_loss", "val_acc", "train_acc"], "val_acc"),
        (["train_acc", "val_loss"], "val_loss"),
        (["loss_step", "loss_epoch", "epoch"], "loss_epoch"),
        (["lr-Adam", "epoch", "selfcompress/loss"], ""),
    ],
)
def test_likely_metric(tags, metric):
    """Validation goes before training, and accuracies before losses; sizes and learning rates are no metrics."""
    assert guess_metric(tags) == metric


@pytest.mark.parametrize(("metric", "mode"), [("val/accuracy", "max"), ("val_loss", "min"), ("test/wer", "min")])
def test_mode_by_the_name(metric, mode):
    """A loss or an error rate is good when it is small."""
    assert guess_mode(metric) == mode


def test_frames_are_thinned_evenly():
    """The first and the last frame stay."""
    frames = [BitsFrame(step, {}) for step in range(101)]
    assert [f.step for f in thinned(frames, 5)] == [0, 25, 50, 75, 100]
    assert thinned(frames[:3], 5) == tuple(frames[:3])


def test_a_recording_stays_small():
    """However long a run is, its record has so many values, the last one among them."""
    recording = Recording()
    for step in range(2 * MOST_POINTS + 7):
        recording.add(step, {"acc": step / 10})
    for step in range(2 * MOST_FRAMES + 7):
        recording.add_frame(step, {"w": torch.full((2,), float(step))})
    series = recording.scalars["acc"]
    assert len(series.steps) <= MOST_POINTS
    assert (series.steps[0], series.steps[-1]) == (0, 2 * MOST_POINTS + 6)
    assert len(recording.frames) <= MOST_FRAMES
    assert recording.frames[-1].bits["w"].tolist() == [2 * MOST_FRAMES + 6] * 2


def test_a_recording_comes_back(tmp_path):
    """What torch's safe loader reads of a recording is the recording."""
    recording = Recording("acc", "python train.py")
    recording.add(3, {"acc": 0.5})
    recording.add_frame(3, {"w": torch.tensor([2.5, torch.nan])})
    recording.left_in_float = (("a", "b"),)
    torch.save(recording.state_dict(), tmp_path / "state")
    back = Recording.from_state(torch.load(tmp_path / "state", weights_only=True))
    assert back.scalars == recording.scalars
    assert torch.allclose(back.frames[0].bits["w"], recording.frames[0].bits["w"], equal_nan=True)
    assert (back.metric, back.command, back.left_in_float) == ("acc", "python train.py", (("a", "b"),))


def test_command_of_a_notebook():
    """A notebook has no command."""
    assert command_of(["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"]) == ""
