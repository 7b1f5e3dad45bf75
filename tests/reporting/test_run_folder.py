"""Runs read from their folders: event files, CSV files, and what is wrong with them."""

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_selfcompress import RunError
from lightning_selfcompress.reporting.event_files import PATTERN
from lightning_selfcompress.reporting.history import CHANNEL_BITS, NBYTES, Series
from lightning_selfcompress.reporting.run_folder import read_run


def write_events(folder, steps, *, scale=1.0):
    with SummaryWriter(folder) as writer:
        for step in steps:
            writer.add_scalar(NBYTES, 1000.0 - step, step)
            writer.add_scalar("val/accuracy", scale * step / 100, step)
            writer.add_scalar("selfcompress/percent_of_float", (1000.0 - step) / 20, step)
            writer.add_tensor(f"{CHANNEL_BITS}net.0.weight", torch.tensor([2.0, step, torch.nan]), step)
    return folder


def event_file(folder):
    (file,) = folder.glob(PATTERN)
    return file


def test_event_files(tmp_path):
    """Scalars and bit depths come back as they were logged, and the float network's bytes by the share that is left."""
    history = read_run(write_events(tmp_path / "run", range(0, 20, 5)))
    assert history.nbytes == Series((0, 5, 10, 15), (1000.0, 995.0, 990.0, 985.0))
    assert (history.name, history.metric, history.mode, history.float_nbytes) == ("run", "val/accuracy", "max", 2000)
    assert [frame.step for frame in history.frames] == [0, 5, 10, 15]
    bits = history.frames[2].bits["net.0.weight"]
    assert bits[:2].tolist() == [2.0, 10.0]
    assert bits[2].isnan()


def test_a_run_that_was_resumed(tmp_path):
    """Of steps that two event files have, the later file's count."""
    write_events(tmp_path, [0, 5, 10])
    first = event_file(tmp_path)
    first.rename(tmp_path / "events.out.tfevents.1")
    history = read_run(write_events(tmp_path, [10, 15], scale=2.0))
    assert history.scalars["val/accuracy"].steps == (0, 5, 10, 15)
    assert history.scalars["val/accuracy"].values == pytest.approx((0, 0.05, 0.2, 0.3))


def test_a_csv_file(tmp_path):
    """The metrics of a CSVLogger are read, whose rows have gaps."""
    rows = ["epoch,step,selfcompress/nbytes,val_loss", "0,9,,0.5", "0,10,800.0,", "1,19,,0.4", "1,20,700.0,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    history = read_run(tmp_path)
    assert history.nbytes == Series((10, 20), (800.0, 700.0))
    assert (history.metric, history.mode) == ("val_loss", "min")
    assert [(p.metric, p.nbytes) for p in history.front] == [(0.4, 700)]


def test_the_folder_above(tmp_path):
    """A folder that holds a single run stands for it."""
    write_events(tmp_path / "logs" / "version_0", [0, 5])
    assert read_run(tmp_path).name == "version_0"


def test_a_record_that_was_cut_off(tmp_path):
    """What was whole before a process was killed is read."""
    write_events(tmp_path, range(9))
    file = event_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-30])
    assert len(read_run(tmp_path).nbytes.steps) == 9


@pytest.mark.parametrize("place", ["in a length", "in a record"])
def test_a_damaged_event_file(place, tmp_path):
    """A byte that changed is told, with the file and what to do."""
    write_events(tmp_path, range(9))
    file = event_file(tmp_path)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + 4 + length + 4 + (0 if place == "in a length" else 20)] ^= 255  # the second record
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"found a damaged record after 1 good ones. Take another copy") as error:
        read_run(tmp_path)
    assert str(file) in str(error.value)


def test_folders_that_are_no_runs(tmp_path):
    """No folder, an empty one, one of another program, of several runs, or without the metric: each is told."""
    with pytest.raises(RunError, match="which is none"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"found neither TensorBoard's event files nor a metrics.csv"):
        read_run(tmp_path)
    with SummaryWriter(tmp_path / "other") as writer:
        writer.add_scalar("loss", 1.0, 0)
    with pytest.raises(RunError, match="whose 1 scalars have no 'selfcompress/nbytes' among them"):
        read_run(tmp_path / "other")
    write_events(tmp_path / "own", [0, 5])
    with pytest.raises(RunError, match=r"found 2: other, own. Name one of them"):
        read_run(tmp_path)
    with pytest.raises(RunError, match=r"a metric 'acc' in .* found 'val/accuracy'. Give one of these to --metric"):
        read_run(tmp_path / "own", metric="acc")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="found no column 'step'"):
        read_run(tmp_path / "csv")
    (tmp_path / "csv" / "metrics.csv").write_text("step,b\n1,2\n2,x\n")
    with pytest.raises(RunError, match="line 3: could not convert"):
        read_run(tmp_path / "csv")


def test_a_checkpoint_that_cannot_be_read(tmp_path):
    """A damaged checkpoint is a note; what the event files hold is reported."""
    write_events(tmp_path, [0, 5])
    (tmp_path / "last.ckpt").write_bytes(b"PK damaged")
    (note,) = read_run(tmp_path).notes
    assert note.startswith("What callbacks recorded is left out: Expected a checkpoint in")
