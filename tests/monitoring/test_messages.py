"""What is said while a Trainer runs, beside its progress bar."""

import io
import logging
import warnings

import lightning.pytorch as pl
import pytest
from fits import fit
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from networks import Lit, batches, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.removal.plan import FADING, RemovalPlan
from lightning_selfcompress.removal.surgery import Edit
from lightning_selfcompress.training.messages import LOGGER, tell, warn
from lightning_selfcompress.training.removal_schedule import RemovalSchedule


class Says(pl.Callback):
    """Says something in the middle of an epoch."""

    def __init__(self, say=tell):
        self.say = say

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.say("here is a line")


def without_handlers(monkeypatch):
    """Makes the root logger what it is where nobody has configured it; pytest adds handlers as a test begins."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def drawn(capsys):
    """What a terminal shows line by line: a carriage return goes back to the beginning of the line."""
    printed = capsys.readouterr()
    return [line.split("\r")[-1].rstrip() for line in printed.out.split("\n")], printed.err


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_lines_do_not_break_the_bar(bar, capsys, monkeypatch):
    """What is said while a bar is drawn has a line of its own, above the bar."""
    without_handlers(monkeypatch)
    make_trainer(SelfCompression(gamma=0.1), bar(), Says(), enable_progress_bar=True).fit(Lit(), batches())
    out, err = drawn(capsys)
    assert "here is a line" in out
    assert "here is a line" not in err


def test_lines_without_a_bar_go_to_stderr(capsys, monkeypatch):
    """Without a bar, before it and after it, lines go to stderr, as those of Lightning do."""
    without_handlers(monkeypatch)
    make_trainer(SelfCompression(gamma=0.1), Says()).fit(Lit(), batches())
    out, err = drawn(capsys)
    assert out == [""]
    lines = err.splitlines()
    assert "here is a line" in lines
    assert lines[-1].endswith("bits per weight left")


def test_a_configured_root_logger_says_it(monkeypatch, capsys):
    """Where the root logger has handlers they write, once, and the bar's line is cleared for them."""
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(stream)])
    make_trainer(SelfCompression(gamma=0.1), TQDMProgressBar(), Says(), enable_progress_bar=True).fit(Lit(), batches())
    assert stream.getvalue().splitlines().count("here is a line") == 1
    assert "here is a line" not in capsys.readouterr().out


def test_warnings_clear_the_bar(capsys):
    """A warning while a bar is drawn comes after the bar's line was cleared."""
    cleared = []

    def say(text):
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn(text)
        cleared.append((capsys.readouterr().out.split("\r")[-2:], [str(w.message) for w in caught]))

    bar = TQDMProgressBar()
    make_trainer(SelfCompression(gamma=0.1), bar, Says(say), enable_progress_bar=True).fit(Lit(), batches())
    (after, told), *_ = cleared
    assert told == ["here is a line"]
    assert "".join(after).strip() == ""


def test_the_logger_decides_how_much(caplog):
    """A removal is one line, DEBUG has its whole plan as well, and nothing is said at WARNING."""
    with caplog.at_level(logging.DEBUG, LOGGER.name):
        fit(1, max_epochs=1)
    said = [(r.levelno, r.getMessage()) for r in caplog.records if r.name == LOGGER.name]
    told = [text for level, text in said if level == logging.INFO and "epoch" in text]
    assert told[0].startswith("SelfCompression, epoch 0: removed 5 channels, ")
    assert told[0].endswith("weights (net.4 16 -> 13, net.0 6 -> 4)")
    assert len([text for text in told if "removed" in text]) == 1
    assert any("Removed: 5 channels" in text for level, text in said if level == logging.DEBUG)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        caplog.clear()
        make_trainer(SelfCompression(gamma=0.1), max_steps=1).fit(Lit(), batches())
        assert not [r for r in caplog.records if r.name == LOGGER.name]


def test_nothing_is_said_of_what_fades(caplog):
    """A dead channel whose constants are still fading is told of when it goes, not before."""
    plan = RemovalPlan(refused={("a", FADING): 2, ("b", "it is the last of its layer"): 1})
    RemovalSchedule(nn.Module())._tell(plan, 3)
    assert [r.getMessage() for r in caplog.records] == [
        "SelfCompression, epoch 3: 1 dead in b stay: it is the last of its layer"
    ]


def test_many_layers_are_counted(caplog):
    """The line of a removal names the layers that lose most, and counts the others."""
    widths = {f"layer{i}": (20, 20 - i) for i in range(1, 8)}
    RemovalSchedule(nn.Module())._tell(RemovalPlan((Edit("a", 0, 2, (1,)),), (1, 2), 10, widths), 0)
    assert caplog.messages == [
        "SelfCompression, epoch 0: removed 2 channels, 10 weights (layer7 20 -> 13, layer6 20 -> 14, "
        "layer5 20 -> 15, layer4 20 -> 16, and 3 more layers)"
    ]
