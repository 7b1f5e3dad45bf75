"""Models of other packages, each through a whole fit: what is quantized, what leaves, and that no output changes.

    python tests/wild/run.py                       # what is not in the results file, or crashed; then the table
    python tests/wild/run.py BERT monai --again    # some models or families once more
    python tests/wild/run.py --table               # docs/models.md from the results alone

A line for each model is added to the results file. Run by ``make test-wild``, in an environment of its own.
"""

import argparse
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision_without_operators  # noqa: F401 - before what imports torchvision
from entry import Entry
from results import read, write
from table import write_table
from trial import tried

FILES = ("senses", "text", "timm", "smp", "diffusion", "medical", "graphs", "forecasts", "chemistry")  # families_*.py


def entries() -> Iterator[Entry]:
    """The models of all families whose packages are installed; says which are not."""
    for name in FILES:
        try:
            yield from importlib.import_module(f"families_{name}").ENTRIES
        except ImportError as error:
            print(f"left out: families_{name} ({error})", flush=True)


def main() -> None:
    """Tries models, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="models or families; all without")
    parser.add_argument("--again", action="store_true", help="try those that the results file has, too")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning_selfcompress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    done = set() if arguments.again else {row["model"] for row in read(arguments.results) if "crashed" not in row}
    for entry in () if arguments.table else entries():
        wanted = not arguments.names or {entry.name, entry.family} & set(arguments.names)
        if wanted and entry.key not in done:
            row = tried(entry)
            write(arguments.results, row)
            told = row.get("crashed") or f"{row['quantized']:.0%} quantized, {row['left']} of {row['killed']} left"
            print(f"{entry.key}: {told} ({row['seconds']} s)", flush=True)
    write_table(read(arguments.results))


if __name__ == "__main__":
    main()
