"""The results file, one JSON line for each network measured; the table and the plot of it."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from size_peers.published import PUBLISHED

Row = dict[str, Any]
KEY = ("task", "network", "recipe", "method", "setting", "seed", "epochs", "quick")
DATA = {"mnist": "MNIST", "cifar": "CIFAR-10 (JPEG copy)"}


def key(row: Row) -> str:
    """What tells one measurement from another."""
    return json.dumps([row[name] for name in KEY], sort_keys=True)


def read(path: Path) -> list[Row]:
    """The rows of a results file; a last line that an interruption cut is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """Adds a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def spread(values: Iterable[float], form: str) -> str:
    """The mean of some values, with their standard deviation where there are several."""
    found = list(values)
    return format(mean(found), form) + (f" ± {stdev(found):{form}}" if len(found) > 1 else "")


def training(row: Row) -> str:
    """The network and its training, in words."""
    recipe = row["recipe"]
    shift = f", shifts of {recipe['shift']}" if recipe["shift"] else ""
    return (
        f"{row['network']}, {row['epochs']} epochs of batches of {recipe['batch_size']}{shift}, "
        f"{recipe['optimizer']} {recipe['lr']:g}{', quick' if row['quick'] else ''}"
    )


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """(task, training, method, setting) -> the rows of all seeds."""
    groups = defaultdict(list)
    for row in rows:
        setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
        groups[row["task"], training(row), row["method"], setting].append(row)
    return dict(groups)


def table(rows: Iterable[Row]) -> str:
    """The rows as a table in Markdown: means and standard deviations over the seeds."""
    lines = [
        "| task | training | method | setting | seeds | bytes | test accuracy, % | validation accuracy, % | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (task, how, method, setting), found in sorted(grouped(rows).items()):
        columns = [
            DATA[task],
            how,
            method,
            setting,
            str(len(found)),
            spread((row["nbytes"] for row in found), ",.0f"),
            spread((row["accuracy"] for row in found), ".2f"),
            spread((row["validation_accuracy"] for row in found), ".2f"),
            spread((row["training_seconds"] for row in found), ",.0f"),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def plot(rows: Iterable[Row], task: str, path: Path) -> None:
    """Draws accuracy against bytes: a line for each method, published networks as stars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for (_, how, method, _), found in grouped(row for row in rows if row["task"] == task).items():
        measured = [row["accuracy"] for row in found]
        error = stdev(measured) if len(found) > 1 else 0.0
        label = f"{method}: {how}"
        points[label].append((mean(row["nbytes"] for row in found), mean(measured), error))
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    best = max([*(p[1] for found in points.values() for p in found), *(p.accuracy for p in PUBLISHED[task])])
    bottom = best - (2.0 if task == "mnist" else 12.0)
    for label, found_points in sorted(points.items()):
        sizes, accuracies, errors = zip(*sorted(found_points), strict=True)
        below = sum(accuracy < bottom for accuracy in accuracies)
        known = label + (f" ({below} below the picture)" if below else "")
        axes.errorbar(sizes, accuracies, errors, marker="o", markersize=4, capsize=2, linewidth=1, label=known)
    stars = PUBLISHED[task]
    label = "published, as reported" + (" on the original CIFAR-10" if task == "cifar" else "")
    axes.scatter([p.nbytes for p in stars], [p.accuracy for p in stars], marker="*", s=90, c="black", label=label)
    for point in stars:
        axes.annotate(point.source, (point.nbytes, point.accuracy), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="test accuracy, %", title=DATA[task])
    axes.set_ylim(bottom, best + (0.1 if task == "mnist" else 1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
