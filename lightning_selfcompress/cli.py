"""The command ``selfcompress``."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch

from lightning_selfcompress.data import DATA_VARIABLE, DataError
from lightning_selfcompress.demo import TASKS, Settings, run_demo, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of the command line.

    Args:
        arguments: What follows the program's name; None takes the process's own.

    Returns:
        Exit status: 0, 2 where the input was wrong, 130 where the user broke off.
    """
    options = parser().parse_args(arguments)
    try:
        return _demo(options)
    except (DataError, ValueError) as error:
        print(f"selfcompress: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    root = argparse.ArgumentParser(prog="selfcompress", description="Networks that compress themselves in training.")
    commands = root.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network on real images, in float and compressed")
    demo.add_argument("--data", choices=sorted(TASKS), default="digits", help="images to train on (default: digits)")
    demo.add_argument("--data-dir", type=Path, help=f"folder with MNIST's files (default: ${DATA_VARIABLE})")
    demo.add_argument("--epochs", type=_positive, help="epochs of each training (default: the data's own)")
    demo.add_argument("--gamma", type=float, help="loss per bit of the average weight (default: the data's own)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs"), help="where the run gets its folder (default: runs)")
    demo.add_argument("--resume", type=Path, metavar="RUN", help="go on with the interrupted run in this folder")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    return root


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("sklearn", "matplotlib", "pooch") if find_spec(name) is None]
    if missing:
        raise DataError(f"the demo needs {', '.join(missing)}: pip install 'lightning-selfcompress[demo]'.")
    if options.resume:
        folder, settings = options.resume, Settings.read(options.resume)
    else:
        task = TASKS[options.data]
        folder = next(f for n in count(1) if not (f := options.out / f"{options.data}-{n}").exists())
        settings = Settings(
            data=options.data,
            data_dir=str(options.data_dir) if options.data_dir else None,
            epochs=options.epochs or task.epochs,
            gamma=task.gamma if options.gamma is None else options.gamma,
            seed=options.seed,
        )
    torch.set_num_threads(TASKS[settings.data].threads)
    try:
        outcomes = run_demo(settings, folder, progress=not options.no_progress)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        program = sys.argv[0] if Path(sys.argv[0]).stem == "selfcompress" else "selfcompress"
        print(f"\nInterrupted. Go on with: {program} demo --resume {folder}", file=sys.stderr)
        return 130
    print(summary(outcomes, folder))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
