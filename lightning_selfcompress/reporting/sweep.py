"""One training script for each of several sizes or gammas; what is done is not run again."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_selfcompress.errors import RunError
from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.reporting.front import Mode
from lightning_selfcompress.reporting.history import RunHistory
from lightning_selfcompress.reporting.run_folder import last_checkpoint, read_run
from lightning_selfcompress.reporting.sweep_config import LOGS, Argument, Value, read_config, with_value

CONFIG, DONE = "run.yaml", "done.json"  # in the folder of each run
SUBCOMMAND = "fit"


@dataclass(frozen=True)
class Sweep:
    """A training script, and the values with which it is run.

    Args:
        command: The command that starts a training by LightningCLI, word by word, its subcommand ``fit`` among them.
        argument: The argument of SelfCompression that the sweep varies.
        values: Its values.
        folder: The folder of the sweep, in which each run has one of its own.
        metric: Name of the metric that is set against the bytes; empty for the likeliest.
        mode: Whether a good metric is small or large; None for what its name says.

    Raises:
        RunError: If the command has no subcommand ``fit``, or a value is named twice.
    """

    command: tuple[str, ...]
    argument: Argument
    values: tuple[Value, ...]
    folder: Path
    metric: str = ""
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if SUBCOMMAND not in self.command:
            raise RunError(
                f"Expected the command of a training by LightningCLI after --, with its subcommand {SUBCOMMAND!r}, got "
                f"{shlex.join(self.command)!r}. Such as: selfcompress sweep --gamma 0.1 0.2 -- python train.py fit."
            )
        if len(set(self.values)) < len(self.values):
            raise RunError(f"Expected each value of {self.argument} once, got {', '.join(map(str, self.values))}.")

    def name(self, value: Value) -> str:
        """The name of a run, which is its folder's."""
        return f"{self.argument}={value}".replace("/", "-").replace(" ", "")


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep that is done.

    Args:
        value: The value of the argument.
        name: The name of the run, which is its folder's.
        seconds: How long the training took, without the parts that were interrupted.
        history: Its record.
    """

    value: Value
    name: str
    seconds: float
    history: RunHistory


def run_sweep(sweep: Sweep) -> tuple[tuple[SweptRun, ...], tuple[str, ...]]:
    """Runs what is not done yet, one run after the other, and reads all of them.

    Args:
        sweep: The sweep.

    Returns:
        The runs that are done, in the order of the values; the names of those that failed.

    Raises:
        RunError: If the command is none of LightningCLI, or a folder holds a run of other settings.
        OSError: If the command cannot be started, or a folder cannot be written.
    """
    config, package = read_config(_printed_config(sweep.command))
    plans = {}
    for value in sweep.values:
        folder = sweep.folder / sweep.name(value)
        content = with_value(config, sweep.argument, value, folder, package=package, metric=sweep.metric)
        plans[value] = yaml.safe_dump(content, sort_keys=False)
        _check_same(folder, plans[value])
    failed = []
    for i, (value, content) in enumerate(plans.items(), start=1):
        name = sweep.name(value)
        if (sweep.folder / name / DONE).exists():
            print(f"{name} ({i} of {len(plans)}): done before", flush=True)
        elif not _train(sweep, value, content, f"{name} ({i} of {len(plans)})"):
            failed.append(name)
    done = (value for value in sweep.values if sweep.name(value) not in failed)
    return tuple(_read(sweep, value) for value in done), tuple(failed)


def _printed_config(command: Sequence[str]) -> str:
    asked = subprocess.run([*command, "--print_config"], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["nothing"]
        raise RunError(
            f"Expected {shlex.join(command)!r} to print its configuration with --print_config, but it ended with "
            f"status {asked.returncode}: {said[-1]}"
        )
    return asked.stdout


def _check_same(folder: Path, content: str) -> None:
    """Refuses to take the run of other settings for one of this sweep."""
    file = folder / CONFIG
    if file.exists() and file.read_text(encoding="utf-8") != content:
        raise RunError(
            f"Expected no run of other settings in {str(folder)!r}, but {CONFIG} there differs from what the command "
            f"gives now. Name another folder with -o, or delete this one."
        )


def _train(sweep: Sweep, value: Value, content: str, told: str) -> bool:
    """Runs one training, from its last checkpoint if it was interrupted; returns whether it ended well."""
    folder = sweep.folder / sweep.name(value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOGS / "config.yaml").unlink(missing_ok=True)  # LightningCLI writes it anew, and only where there is none
    write_beside(folder / CONFIG, lambda part: part.write_text(content, encoding="utf-8"))
    words = [*sweep.command[: sweep.command.index(SUBCOMMAND) + 1], "--config", str(folder / CONFIG)]
    checkpoint = last_checkpoint(folder)
    words += ["--ckpt_path", str(checkpoint)] if checkpoint is not None else []
    print(f"{told}: {shlex.join(words)}", flush=True)
    start = time.monotonic()
    status = subprocess.run(words).returncode
    if status:
        print(f"{told}: failed with status {status}", file=sys.stderr, flush=True)
        return False
    outcome = json.dumps({"seconds": round(time.monotonic() - start, 1)})
    write_beside(folder / DONE, lambda part: part.write_text(outcome))
    return True


def _read(sweep: Sweep, value: Value) -> SweptRun:
    name = sweep.name(value)
    history = read_run(sweep.folder / name, metric=sweep.metric, mode=sweep.mode)
    return SweptRun(value, name, json.loads((sweep.folder / name / DONE).read_text())["seconds"], history)
