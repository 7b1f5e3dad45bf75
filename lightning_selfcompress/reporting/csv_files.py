"""What the file of Lightning's CSVLogger holds: scalars."""

import csv
from pathlib import Path

from lightning_selfcompress.errors import RunError
from lightning_selfcompress.reporting.history import Series

NAME = "metrics.csv"


def read_csv_file(file: Path) -> dict[str, Series]:
    """Reads the metrics of one run.

    Args:
        file: ``metrics.csv`` of a CSVLogger.

    Returns:
        Tag of each scalar -> its values.

    Raises:
        RunError: If the file is none of a CSVLogger, or a value in it is no number.
    """
    scalars: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        rows = csv.DictReader(stream)
        if "step" not in (rows.fieldnames or ()):
            raise RunError(f"Expected a file of Lightning's CSVLogger in {str(file)!r}, found no column 'step' in it.")
        for line, row in enumerate(rows, start=2):
            try:
                step = int(row.pop("step") or 0)
                for tag, text in row.items():
                    if text:
                        scalars.setdefault(tag, {})[step] = float(text)
            except (TypeError, ValueError) as error:
                raise RunError(
                    f"Expected numbers in {str(file)!r}, line {line}: {error}. The file is damaged; take another copy."
                ) from error
    return {tag: Series.of(points) for tag, points in scalars.items()}
