"""One self-contained HTML page about a run; its template, style and script lie in ``template``."""

import base64
import json
import os
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from math import isfinite
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.monitoring.scalars import PREFIX
from lightning_selfcompress.reporting.front import Point
from lightning_selfcompress.reporting.history import RunHistory, Series, thinned
from lightning_selfcompress.tables import html_table

MOST_FRAMES = 100  # of the bits on a page
MOST_POINTS = 1000  # of a curve, which has no more pixels
BITS_STEP = 1 / 12  # bits go into a page as whole numbers of these, of a byte each
REMOVED = 255  # the byte of a channel that was removed
_TARGET = f"{PREFIX}/target"


def write_page(page: str, path: Path) -> None:
    """Writes a page, completely or not at all.

    Args:
        page: The text of the page.
        path: The file.

    Raises:
        OSError: If the file cannot be written.
    """
    check_path(path)
    write_beside(path, lambda part: part.write_text(page, encoding="utf-8"))


def check_path(path: Path) -> None:
    """Checks that a file can be written at a path, before there is anything to write.

    Args:
        path: The file.

    Raises:
        OSError: If the path is a folder, or lies in none that can be written.
    """
    if path.is_dir():
        raise IsADirectoryError(None, "Expected a path for a file, this is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(None, "There is no folder for this file, create it first", str(path))
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(None, "It cannot be written here", str(path))


def report_page(history: RunHistory) -> str:
    """Returns the page of a run as HTML.

    Args:
        history: The record of the run.
    """
    sections = [
        _figures(history),
        _section("curves", "Size and metric", '<div id="curves"></div>'),
        _section("bits", "Bits of each channel", '<div id="bits"></div>') if history.frames else "",
        _section("front", "The front", '<div id="front"></div>' + _front_table(history)) if history.points else "",
        _section("layers", "Layers, before and after", _layer_table(history)) if history.layers else "",
        _section("float", "What was not compressed", _float_list(history)) if history.left_in_float else "",
        _section("command", "To run it again", _command(history)),
        "".join(f'<p class="note">{escape(note)}</p>' for note in history.notes),
    ]
    return page(f"{history.name}, compressed", "\n".join(sections), report_values(history))


def page(title: str, body: str, values: Mapping[str, Any]) -> str:
    """Fills the template of a page.

    Args:
        title: The title of the page, as plain text.
        body: The sections of the page, as HTML.
        values: What the script draws, which JSON can hold.
    """
    folder = files(__package__) / "template"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    data = json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(text["page.html"]).substitute(
        title=escape(title), body=body, data=data, style=text["page.css"], script=text["page.js"]
    )


def report_values(history: RunHistory) -> dict[str, Any]:
    """Returns what the script of the page draws, in values that JSON can hold.

    Args:
        history: The record of a run.
    """
    metric = history.scalars.get(history.metric, Series())
    target = history.scalars.get(_TARGET)
    return {
        "metric": history.metric,
        "mode": history.mode,
        "nbytes": _curve(history.nbytes),
        "values": _curve(metric),
        "target": target.values[-1] if target and target.values else None,
        "float_nbytes": history.float_nbytes,
        "points": [_point(p) for p in history.points if isfinite(p.metric)],
        "front": [_point(p) for p in history.front if isfinite(p.metric)],
        "bits": _bits(history),
    }


def _curve(series: Series) -> list[list[float]]:
    points = [[s, v] for s, v in zip(series.steps, series.values, strict=True) if isfinite(v)]
    every = -(-len(points) // MOST_POINTS) or 1
    return [*points[:-1:every], *points[-1:]]


def _point(point: Point) -> list[Any]:
    return [point.nbytes, point.metric, point.step, Path(point.name).name]


def _bits(history: RunHistory) -> dict[str, Any]:
    """Returns the frames of bits, the channels of each weight as bytes in base64."""
    frames = thinned(history.frames, MOST_FRAMES)
    names = list(dict.fromkeys(name for frame in frames for name in frame.bits))
    return {
        "left_out": len(history.frames) - len(frames),
        "step": BITS_STEP,
        "steps": [frame.step for frame in frames],
        "layers": [
            {
                "name": name.removesuffix(".weight"),
                "frames": [_as_text(frame.bits[name]) if name in frame.bits else "" for frame in frames],
            }
            for name in names
        ],
    }


def _as_text(bits: Tensor) -> str:
    """Returns bits as bytes in base64, in whole numbers of ``BITS_STEP``; what was removed is ``REMOVED``."""
    codes = (bits / BITS_STEP).round().clamp(0, REMOVED - 1)
    codes = torch.where((bits > 0) & (codes == 0), torch.ones_like(codes), codes)  # faint is not dead
    whole = torch.where(bits.isnan(), torch.full_like(codes, REMOVED), codes).to(torch.uint8)
    return base64.b64encode(bytes(whole.tolist())).decode()


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="section-{name}"><h2>{escape(title)}</h2>{content}</section>'


def _figures(history: RunHistory) -> str:
    """Returns the few numbers at the top of the page."""
    figures: list[tuple[str, str, str]] = []
    if history.nbytes.values:
        now, whole = history.nbytes.values[-1], history.float_nbytes
        before = f"from {whole:,} bytes in float, {now / whole:.1%} of it" if whole else "as a packed file"
        figures.append(("Size", f"{now:,.0f} bytes", before))
    metric = history.scalars.get(history.metric)
    if metric is not None and metric.values:
        best = (max if history.mode == "max" else min)(metric.values)
        figures.append((history.metric, f"{metric.values[-1]:.4g}", f"at the end; {best:.4g} at its best"))
    channels = [(layer.channels_before, layer.channels) for layer in history.layers]
    known = [(a, b) for a, b in channels if a is not None and b is not None]
    if known:
        before, left = (sum(column) for column in zip(*known, strict=True))
        figures.append(("Channels", f"{left:,}", f"of {before:,}; {before - left:,} dead or removed"))
    bits = history.scalars.get(f"{PREFIX}/bits_per_weight", Series())
    if bits.values:
        figures.append(("Learned bits", f"{bits.values[-1]:.2f}", "per weight of the network as it was"))
    tiles = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd><dd class='more'>{escape(more)}</dd></div>"
        for what, value, more in figures
    )
    return f'<dl class="figures">{tiles}</dl>'


def _layer_table(history: RunHistory) -> str:
    """Returns the table of layers, without the columns of which nothing is known."""
    columns: list[tuple[str, Any]] = [
        ("channels", lambda x: x.channels),
        ("of", lambda x: x.channels_before),
        ("weights", lambda x: x.weights),
        ("of", lambda x: x.weights_before),
        ("learned bits", lambda x: x.bits),
        ("packed B", lambda x: x.nbytes),
        ("float B", lambda x: x.nbytes_before),
        ("MACs", lambda x: x.macs),
        ("of", lambda x: x.macs_before),
    ]
    shown = [(head, get) for head, get in columns if any(get(layer) is not None for layer in history.layers)]
    rows = [(layer.name, *(_number(get(layer)) for _, get in shown)) for layer in history.layers]
    sums = [
        "" if head == "learned bits" else _number(_sum([get(layer) for layer in history.layers])) for head, get in shown
    ]
    others = [(f"{what}: {n:,} bytes") for what, n in history.other_nbytes.items() if n]
    told = [f"Besides in the packed file: {'; '.join(others)}."] if others else []
    told += [history.layers_of] if history.layers_of else []
    below = "".join(f'<p class="note">{escape(text)}</p>' for text in told)
    return html_table(("layer", *(head for head, _ in shown)), rows, ("total", *sums)) + below


def _front_table(history: RunHistory) -> str:
    rows = [(Path(p.name).name or "not kept", f"{p.nbytes:,}", f"{p.metric:.5g}", f"{p.step:,}") for p in history.front]
    return html_table(("checkpoint", "bytes", history.metric, "step"), rows)


def _float_list(history: RunHistory) -> str:
    rows = "".join(f"<dt>{escape(what)}</dt><dd>{escape(why)}</dd>" for what, why in history.left_in_float)
    return f'<dl class="reasons">{rows}</dl>'


def _command(history: RunHistory) -> str:
    if not history.command:
        return (
            '<p class="note">The command is not known: it is recorded where CompressionReport is among the callbacks of'
            " a script.</p>"
        )
    return f"<pre><code>{escape(history.command)}</code></pre>"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def _sum(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
