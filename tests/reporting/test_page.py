"""The page of a run: what it draws, what it escapes, and that it needs nothing else."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from lightning_selfcompress.reporting.front import Point
from lightning_selfcompress.reporting.history import NBYTES, BitsFrame, LayerChange, RunHistory, Series
from lightning_selfcompress.reporting.page import BITS_STEP, REMOVED, report_page, report_values, write_page

HOSTILE = "</script><script>alert(1)</script>"


def history(**changes):
    fields = {
        "scalars": {NBYTES: Series((0, 10), (900.0, 450.0)), "acc": Series((9,), (0.5,))},
        "metric": "acc",
        "frames": (BitsFrame(10, {"net.0.weight": torch.tensor([4.0, 0.0, 0.01, torch.nan])}),),
        "layers": (LayerChange("net.0", 4, 2, 40, 20, 2.5, 160, 30, 400, 200),),
        "float_nbytes": 1800,
        "left_in_float": (("BatchNorm2d: net.1 (8 values)", "one value per channel, no weight matrix"),),
        "kept": (Point(0.5, 450, 10, "run/a.ckpt"),),
        "command": "python train.py",
    }
    return RunHistory(**({"name": "run"} | fields | changes))


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def test_what_is_drawn():
    """Curves, points, front and bits are those of the record."""
    values = data_of(report_page(history()))
    assert values == json.loads(json.dumps(report_values(history())))
    assert (values["nbytes"], values["values"]) == ([[0, 900.0], [10, 450.0]], [[9, 0.5]])
    assert values["front"] == values["points"] == [[450, 0.5, 10, "a.ckpt"]]
    (layer,) = values["bits"]["layers"]
    assert (layer["name"], values["bits"]["steps"]) == ("net.0", [10])
    assert list(base64.b64decode(layer["frames"][0])) == [round(4 / BITS_STEP), 0, 1, REMOVED]


def test_what_is_written():
    """Size, layers, reasons and the command stand in the page."""
    page = report_page(history())
    text = re.sub(r"<[^>]+>", " ", page[: page.index('<script type="application/json"')])
    for words in (
        "450 bytes",
        "from 1,800 bytes in float, 25.0% of it",
        "of 4; 2 dead or removed",
        "BatchNorm2d: net.1",
    ):
        assert words in " ".join(text.split())
    assert "<pre><code>python train.py</code></pre>" in page
    assert '<td style="text-align:right">400</td>' in page


def test_nothing_is_loaded_from_elsewhere():
    """The page names no address, and tells browsers to load nothing."""
    page = report_page(history())
    outside = page.replace("http://www.w3.org/2000/svg", "")  # the name of SVG, which is not loaded
    assert "//" not in re.sub(r"^ *// .*$", "", outside, flags=re.MULTILINE)
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']""", page)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.scripts = [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("where", ["name", "command", "layer", "reason", "metric", "file"])
def test_names_are_no_code(where):
    """Whatever a name holds is text, and all tags are closed."""
    changes = {
        "name": {"name": HOSTILE},
        "command": {"command": HOSTILE},
        "layer": {
            "frames": (BitsFrame(1, {HOSTILE: torch.ones(2)}),),
            "layers": (LayerChange(HOSTILE, 4, 2, 40, 20, 2.5, 160, 30),),
        },
        "reason": {"left_in_float": ((HOSTILE, HOSTILE),)},
        "metric": {"metric": HOSTILE, "scalars": {NBYTES: Series((1,), (5.0,)), HOSTILE: Series((1,), (0.5,))}},
        "file": {"kept": (Point(0.5, 450, 10, HOSTILE),)},
    }
    page = report_page(history(**changes[where]))
    tags = Tags()
    tags.feed(page)
    assert (tags.scripts, tags.open) == (2, [])
    assert data_of(page)["bits"]["layers"][0]["name"]


def test_little_is_known():
    """A run of which nothing but the size is known has a page too."""
    page = report_page(RunHistory("run", {NBYTES: Series((0,), (900.0,))}))
    assert "section-layers" not in page
    assert "The command is not known" in page
    assert data_of(page)["points"] == []


def test_numbers_that_json_has_not():
    """A loss that was infinite or no number leaves a gap in the curve."""
    scalars = {NBYTES: Series((0, 1), (9.0, 8.0)), "acc": Series((0, 1, 2), (0.5, float("nan"), float("inf")))}
    values = data_of(report_page(history(scalars=scalars, kept=())))
    assert values["values"] == [[0, 0.5]]
    assert values["points"] == [[8, 0.5, 0, ""]]


def test_nothing_half_written(tmp_path):
    """A path that cannot be written is refused, and what is there stays as it is."""
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_page(report_page(history()), tmp_path / "nowhere" / "report.html")
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        write_page(report_page(history()), tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_page(report_page(history()), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
