"""The size in progress bars, and in a line at the end."""

import pytest
import torch
from fits import fit
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from networks import Lit, batches, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.monitoring.progress_bar import fit_summary, size_text
from lightning_selfcompress.quantize.convert import convert


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (4 * 10**12, "4000 GB")],
)
def test_a_size_has_three_digits(nbytes, size):
    """A size is a number of three digits with its unit, and the percent of the float network."""
    assert size_text(nbytes, 10**7) == f"{size} ({nbytes / 10**7:.1%})"


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_users_bar_shows_the_size(bar, capsys):
    """Bars of tqdm and of rich show the size of the network as it is at the end."""
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=1.0), bar(), max_epochs=2, enable_progress_bar=True)
    trainer.fit(model, batches(), batches(1))
    report = size_report(model)
    text = size_text(report.nbytes, report.float_nbytes)
    assert trainer.progress_bar_metrics["size"] == text
    drawn = " ".join(capsys.readouterr().out.split())
    assert (f"size={text}" if bar is TQDMProgressBar else "size:") in drawn


def test_a_line_at_the_end(caplog):
    """A fit ends with bytes before and after, the channels that went, and the bits of each weight that is left."""
    model, _ = fit(1, max_epochs=1)
    report = size_report(model)
    bits = 8 * report.total.code_nbytes / report.total.weights
    said = [r.getMessage() for r in caplog.records if r.name == "lightning_selfcompress"]
    assert said[-1] == (
        f"SelfCompression: {report.float_nbytes:,} -> {report.nbytes:,} bytes "
        f"({report.nbytes / report.float_nbytes:.1%}), 5 of 26 channels removed, {bits:.1f} bits per weight left"
    )


def test_channels_that_are_dead_but_there_are_not_removed():
    """A channel without bits counts as removed once it is out of the network."""
    net = nn.Sequential(nn.Linear(3, 4))
    convert(net)
    with torch.no_grad():
        net[0].bit_depth[0] = -1.0
    assert "0 of 4 channels removed" in fit_summary(net, size_report(net))
