"""The results file: one JSON line for each model, the last of a model counts."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a results file, in its order; a last line that an interruption cut is left out."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["model"]] = row
    return list(rows.values())


def write(path: Path, row: Row) -> None:
    """Adds a row, in place of an earlier one of the same model."""
    rows = {earlier["model"]: earlier for earlier in read(path)} | {row["model"]: row}
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)), encoding="utf-8")
    part.replace(path)
