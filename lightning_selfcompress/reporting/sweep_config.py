"""The configuration of one run of a sweep: the user's own, with another price or size and a folder of its own."""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_selfcompress.errors import RunError

Argument = Literal["gamma", "target_size"]
Value = float | str
LOGS, CHECKPOINTS, REPORT = "logs", "checkpoints", "report.html"  # in the folder of each run
_HEADER = re.compile(r"^# (lightning\.pytorch|pytorch_lightning)==", re.MULTILINE)
_OWN_FILES = ("TensorBoardLogger", "CSVLogger")  # loggers that write where they are told


def read_config(printed: str) -> tuple[dict[str, Any], str]:
    """Reads what a script of LightningCLI prints with ``--print_config``, behind whatever else it prints.

    Args:
        printed: The output of the script.

    Returns:
        The configuration, and the package of its Trainer: ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        RunError: If there is no configuration of a Trainer in it.
    """
    header = _HEADER.search(printed)
    try:
        config = yaml.safe_load(printed[header.start() :]) if header else None
    except yaml.YAMLError:
        config = None
    if header is None or not isinstance(config, dict) or not isinstance(config.get("trainer"), dict):
        raise RunError(
            "Expected a script of LightningCLI, which prints its configuration with --print_config, got "
            f"{printed.strip()[:80]!r}. Give the command that starts a training, such as: python train.py fit."
        )
    return config, header[1]


def with_value(
    config: dict[str, Any], argument: Argument, value: Value, folder: Path, *, package: str, metric: str = ""
) -> dict[str, Any]:
    """Returns the configuration of one run: SelfCompression gets a value, and all files lie in the run's folder.

    A SelfCompression is added where the configuration has none, and a CompressionReport, which looks on. Loggers that
    write files are replaced by one for TensorBoard in the folder; others stay.

    Args:
        config: The user's configuration, which stays as it is.
        argument: The argument of SelfCompression that the sweep varies; the other one becomes null.
        value: Its value.
        folder: The folder of the run.
        package: The package of the Trainer.
        metric: The metric of the report; empty for the likeliest.
    """
    config = copy.deepcopy(config)
    trainer = config["trainer"]
    callbacks = [callback for callback in _listed(trainer.get("callbacks")) if _class(callback) != "CompressionReport"]
    goal = {"gamma": None, "target_size": None, argument: value}
    for callback in callbacks:
        arguments = callback.get("init_args") or {}
        if _class(callback) == "SelfCompression":
            callback["init_args"] = arguments | goal
        if arguments.get("dirpath"):
            arguments["dirpath"] = str(folder / CHECKPOINTS)
    if not any(_class(callback) == "SelfCompression" for callback in callbacks):
        callbacks.append({"class_path": "lightning_selfcompress.SelfCompression", "init_args": goal})
    report = {"path": str(folder / REPORT), "monitor": metric}
    callbacks.append({"class_path": "lightning_selfcompress.CompressionReport", "init_args": report})
    files = {"save_dir": str(folder / LOGS), "name": "", "version": ""}
    logger = {"class_path": f"{package}.loggers.TensorBoardLogger", "init_args": files}
    others = [entry for entry in _listed(trainer.get("logger")) if _class(entry) not in _OWN_FILES]
    config["trainer"] = trainer | {
        "callbacks": callbacks,
        "logger": [logger, *others],
        "default_root_dir": str(folder),
    }
    return config


def _listed(value: Any) -> list[dict[str, Any]]:
    """Returns the classes of an entry that may be one class, a list of them, a yes or no, or null."""
    entries: Iterable[Any] = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, dict)]


def _class(entry: dict[str, Any]) -> str:
    return str(entry.get("class_path", "")).rpartition(".")[2]
