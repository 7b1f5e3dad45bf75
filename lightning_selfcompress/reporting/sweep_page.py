"""The runs of a sweep beside each other: one table, and one page with the plot."""

from collections.abc import Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_selfcompress.reporting.front import Point, front
from lightning_selfcompress.reporting.page import page
from lightning_selfcompress.reporting.sweep import SweptRun
from lightning_selfcompress.reporting.sweep_config import REPORT
from lightning_selfcompress.tables import html_table, table

_HEAD = ("run", "bytes", "of float", "metric", "best metric", "seconds")


def sweep_table(runs: Sequence[SweptRun]) -> str:
    """Formats the runs of a sweep as a table of text, a star at each run that no other beats.

    Args:
        runs: The runs that are done.
    """
    head, rows = _rows(runs)
    return table(head, rows)


def sweep_page(runs: Sequence[SweptRun], command: str, folder: Path) -> str:
    """Returns the page of a sweep as HTML: its plot, its table, and where the report of each run lies.

    Args:
        runs: The runs that are done.
        command: The command that ran the sweep.
        folder: The folder of the sweep, in which the page will lie.
    """
    head, rows = _rows(runs)
    reports = [run.name for run in runs if (folder / run.name / REPORT).exists()]
    links = ", ".join(f'<a href="{quote(f"{name}/{REPORT}")}">{escape(name)}</a>' for name in reports)
    body = (
        f'<section><h2>Metric against bytes</h2><div id="front"></div></section>'
        f"<section><h2>Runs</h2>{html_table(head, rows)}"
        f'<p class="note">A star marks the runs that no other beats in both. Single runs: {links}</p></section>'
        f"<section><h2>To run it again</h2><pre><code>{escape(command)}</code></pre></section>"
    )
    return page(f"Sweep of {len(runs)} runs", body, _values(runs))


def _end(run: SweptRun) -> Point:
    """The network at the end of a run."""
    history = run.history
    metric = history.scalars[history.metric].values if history.metric else (float("nan"),)
    return Point(metric[-1], round(history.nbytes.values[-1]), history.nbytes.steps[-1], run.name)


def _values(runs: Sequence[SweptRun]) -> dict[str, Any]:
    ends = [_end(run) for run in runs]
    mode = runs[0].history.mode if runs else "max"
    return {
        "runs": True,
        "metric": runs[0].history.metric if runs else "",
        "points": [[p.nbytes, p.metric, p.step, p.name] for p in ends if isfinite(p.metric)],
        "front": [[p.nbytes, p.metric, p.step, p.name] for p in front(ends, mode) if isfinite(p.metric)],
    }


def _rows(runs: Sequence[SweptRun]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    ends = [_end(run) for run in runs]
    unbeaten = {p.name for p in front(ends, runs[0].history.mode)} if runs else set()
    metric = runs[0].history.metric if runs else "metric"
    rows: list[tuple[str, ...]] = []
    for run, end in zip(runs, ends, strict=True):
        history = run.history
        best = max if history.mode == "max" else min
        values = history.scalars[history.metric].values if history.metric else (float("nan"),)
        share = f"{end.nbytes / history.float_nbytes:.1%}" if history.float_nbytes else ""
        name = f"{run.name}{' *' if run.name in unbeaten else ''}"
        seconds = f"{run.seconds:,.0f}"
        rows.append((name, f"{end.nbytes:,}", share, f"{end.metric:.4g}", f"{best(values):.4g}", seconds))
    head = tuple(metric if word == "metric" else f"best {metric}" if word == "best metric" else word for word in _HEAD)
    return head, rows
