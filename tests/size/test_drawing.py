"""A size report as a picture, as a table in notebooks, and as plain values."""

import json
import sys

import pytest
from matplotlib import pyplot
from torch import nn

from lightning_selfcompress import convert, size_report
from lightning_selfcompress.tables import html_table


@pytest.fixture
def report():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return size_report(convert(net, initial_bits=3).model)


def test_bars(report):
    """Each layer has a bar of its bytes, everything else follows, and all bars together are the file."""
    figure, ax = report.plot()
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["0", "2"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[:2] == [size.code_nbytes + size.scale_nbytes for size in report.layers]
    assert sum(widths) == pytest.approx(report.nbytes, abs=5)  # of layers rounded, and without the state of the coder
    assert ax.get_xlim()[0] == 0
    assert figure.axes == [ax]
    pyplot.close("all")


def test_bars_on_given_axes(report):
    """Axes of one's own are drawn on, and no figure is made."""
    _, own = pyplot.subplots()
    figure, ax = report.plot(own)
    assert (figure, ax) == (None, own)
    assert len(pyplot.get_fignums()) == 1
    pyplot.close("all")


def test_without_matplotlib(report, monkeypatch):
    """Where matplotlib is missing, the error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        report.plot()


def test_plain_values(report):
    """JSON takes the values, and they are those of the report."""
    values = json.loads(json.dumps(report.to_dict()))
    assert values["nbytes"] == report.nbytes
    assert values["total"]["channels"] == report.channels == 9
    assert [layer["name"] for layer in values["layers"]] == ["0", "2"]
    assert values["layers"][0]["mean_bits"] == values["bits_per_weight"] == 3.0


def test_table_in_a_notebook(report):
    """A notebook shows the layers as a table, with the total in its foot."""
    text = report._repr_html_()
    assert text.count("<tr>") == 1 + 2 + 1
    assert f"{report.nbytes:,}" in text
    assert "<tfoot><tr><td" in text
    assert "<table>" not in size_report(nn.Linear(3, 2))._repr_html_()


def test_cells_are_text():
    """Whatever a cell holds is text, the first columns flush left and numbers flush right."""
    made = html_table(("a", "b"), [("<b>\x1b[1m", "1")])
    assert '<td style="text-align:left">&lt;b&gt;\N{REPLACEMENT CHARACTER}[1m</td>' in made
    assert '<td style="text-align:right">1</td>' in made
