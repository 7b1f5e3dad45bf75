"""Runs every notebook with fast settings, as many at once as there are processors, each in an empty folder."""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from fast_notebooks import make_fast
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

LIMIT = 600  # seconds a notebook may take


def run(path: Path) -> bool:
    """Runs one notebook, prints what it took, and returns whether it ran to its end in time."""
    notebook = nbformat.read(path, as_version=4)
    make_fast(notebook, path.stem)
    start = time.monotonic()
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": folder}}).execute()
        except (CellExecutionError, TimeoutError) as error:
            failure = str(error)
    seconds = time.monotonic() - start
    if seconds > LIMIT:
        failure = failure or f"Expected at most {LIMIT} s."
    print(f"{path.name}: {seconds:.0f} s{', failed' if failure else ''}", flush=True)
    print(failure, end="", flush=True)
    return not failure


def main(paths: list[Path]) -> int:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 0 if all(list(pool.map(run, paths))) else 1


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # of the kernels, which are processes of their own
    sys.exit(main([Path(argument).resolve() for argument in sys.argv[1:]]))
