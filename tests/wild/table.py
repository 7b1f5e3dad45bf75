"""docs/models.md, written from the results."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from results import Row

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
PACKAGES = (
    "transformers",
    "timm",
    "segmentation-models-pytorch",
    "diffusers",
    "monai",
    "torch-geometric",
    "pytorch-forecasting",
    "chemprop",
)
ENOUGH = 0.9  # a share below it is told with its reasons
EXACT = {"64-true": 1e-10, "32-true": 1e-4}  # differences above it are told

PARTS = {"hidden": "the hidden widths of feed-forward blocks", "heads": "the channels of heads that were killed whole"}

HEAD = """# Models of other packages

Each model is built tiny from its configuration, and trained with the callback for 56 steps on random data. After the \
first step one in four channels of every layer is killed, those of the same numbers everywhere; where heads or groups \
go as a whole, one of these. Written by `make test-wild` with {versions}.

- *quantized*: the share of the entries of parameters with two and more dimensions that belong to quantized weights.
- *left*: the share of the killed channels that left, counted for each layer. Channels of the network's outputs are \
killed too and have to stay.
- *hidden* and *heads*: the same share of hidden widths of feed-forward blocks alone, known by the names of layers, \
and of layers of which a whole head was killed; empty where they were not counted.
- The last column says why a share is below 90%, with the number of channels; what is tied in a layer counts as one.
- *exact*: outputs before and after the removals are the same to 1e-10 in float64 (1e-4 where the model has only \
float32), and so are those of a new model that loads the packed file, and those of a training that is resumed.

"""


def write_table(rows: Iterable[Row]) -> None:
    """Writes docs/models.md."""
    rows = list(rows)
    names = ("torch", "lightning", *PACKAGES)
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    crashed = sum("crashed" in row for row in rows)
    lines = [HEAD.format(versions=versions) + f"{len(rows)} models, {crashed} of them crashed.\n"]
    lines += [
        "| model | parameters | quantized | left | hidden | heads | exact | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row) for row in rows]
    killed, left = (sum(row.get(name, 0) for row in rows) for name in ("killed", "left"))
    lines += ["", f"Of {killed:,} killed channels {left:,} left, {left / max(killed, 1):.0%}."]
    lines += [f"{_sum_of_parts(rows, kind)} of {what}." for kind, what in PARTS.items()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except ImportError:
        return "(not installed)"


def _line(row: Row) -> str:
    left = row["left"] / row["killed"] if row.get("killed") else None
    cells = [
        row["model"],
        f"{row['parameters']:,}" if "parameters" in row else "",
        f"{row['quantized']:.0%}" if "quantized" in row else "",
        "" if left is None else f"{left:.0%}",
        *(_share(*row.get("parts", {}).get(kind, (0, 0))) for kind in PARTS),
        _exact(row),
        "; ".join(_notes(row, left)),
    ]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _share(killed: int, left: int) -> str:
    return f"{left / killed:.0%}" if killed else ""


def _sum_of_parts(rows: Iterable[Row], kind: str) -> str:
    killed, left = (sum(row.get("parts", {}).get(kind, (0, 0))[i] for row in rows) for i in (0, 1))
    return f"{left:,} of {killed:,}, {left / max(killed, 1):.0%},"


def _exact(row: Row) -> str:
    names = ("removal", "load", "resume")
    found = {name: row[f"{name}_difference"] for name in names if f"{name}_difference" in row}
    worse = [f"{name}: {value:.0e}" for name, value in found.items() if not value <= EXACT[row["precision"]]]
    return ", ".join(worse) or ("yes" if len(found) == len(names) else "")


def _notes(row: Row, left: float | None) -> list[str]:
    notes = [f"crashed: {row['crashed']}"] if "crashed" in row else []
    if row.get("quantized", 1.0) < ENOUGH:
        notes += [f"in float: {why} ({n:,})" for why, n in list(row["float"].items())[:3]]
    if left is not None and left < ENOUGH:
        reasons = _by_reason(row["refused"]) or {"they share their fate with channels that live": row["killed"]}
        notes += [f"stay: {why} ({n})" for why, n in list(reasons.items())[:4]]
    return notes


def _by_reason(refused: Mapping[str, int]) -> dict[str, int]:
    """Adds up reasons that differ in the names of layers alone."""
    found: Counter[str] = Counter()
    for line, n in refused.items():
        _, _, why = line.partition(": ")
        found[re.sub(r"\.\d+(?=[.'])", ".*", why)] += n
    return dict(found.most_common())
