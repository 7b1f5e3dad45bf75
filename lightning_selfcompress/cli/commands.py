"""The subcommands of ``selfcompress``. Each function takes the options and returns the exit status."""

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_selfcompress.cli.contents import read_contents, with_network
from lightning_selfcompress.cli.differences import differences
from lightning_selfcompress.cli.model_class import module_class
from lightning_selfcompress.cli.run_layers import with_checkpoint, with_model
from lightning_selfcompress.cli.text import contents_text, contents_values, differences_text, differences_values
from lightning_selfcompress.errors import CheckpointError, DataError, RunError
from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.files.checkpoint import load_from_checkpoint, read_checkpoint
from lightning_selfcompress.files.export import export
from lightning_selfcompress.files.finalize import finalize
from lightning_selfcompress.files.load import load
from lightning_selfcompress.onnx.export import WEIGHTS, to_onnx
from lightning_selfcompress.reporting.page import check_path, report_page, write_page
from lightning_selfcompress.reporting.run_folder import last_checkpoint, read_run
from lightning_selfcompress.reporting.sweep import Sweep, run_sweep
from lightning_selfcompress.reporting.sweep_config import Argument, Value
from lightning_selfcompress.reporting.sweep_page import sweep_page, sweep_table
from lightning_selfcompress.tables import line_width

DIFFERENT = 2  # exit status of diff if files differ; every command ends with status 1 on an error


def _demo(options: argparse.Namespace) -> int:
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "pooch": "pooch"}
    missing = [package for name, package in packages.items() if find_spec(name) is None]
    if missing:
        raise DataError(f"the demo needs {', '.join(missing)}: pip install {' '.join(missing)}.")
    from lightning_selfcompress.demo.run import TASKS, Settings, run_demo, summary

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
    except (KeyboardInterrupt, SystemExit):  # Lightning turns a KeyboardInterrupt into a SystemExit
        program = sys.argv[0] if Path(sys.argv[0]).stem == "selfcompress" else "selfcompress"
        print(f"\nInterrupted. Go on with: {program} demo --resume {folder}", file=sys.stderr)
        return 130
    print(summary(outcomes, folder))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    contents = read_contents(options.file, trusted=options.trust)
    if options.model:
        if contents.kind == "packed":
            raise ValueError(
                f"Expected a checkpoint where --model is given, {options.file!r} is a packed file already."
            )
        contents = with_network(contents, _open(options.model, options.file, trusted=options.trust))
    if options.json:
        print(json.dumps(contents_values(contents), indent=2, allow_nan=False), flush=True)
    else:
        print(contents_text(contents, width=line_width()), flush=True)
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.float16 and options.to != "packed":
        raise ValueError(f"Expected --float16 with --to packed, got --to {options.to}. Leave it out.")
    of_onnx = (("--round-to", options.round_to), ("--weights", options.weights), ("--fastest", options.fastest))
    for name, value in of_onnx:
        if value and options.to != "onnx":
            raise ValueError(f"Expected {name} with --to onnx, got --to {options.to}. Leave it out.")
    if bool(options.input) != (options.to == "onnx"):
        raise ValueError("Expected --input SHAPE, such as --input 1,1,28,28, with --to onnx and only there.")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):
        raise ValueError(f"Expected a file in a folder that can be written, got -o {str(options.out)!r}.")
    if options.out.exists() and options.out.samefile(options.checkpoint):
        raise ValueError(f"Expected another file than the one that is read, got -o {str(options.out)!r}.")
    packed = _is_packed(options.checkpoint, trusted=options.trust)
    if packed and options.to == "packed":
        raise ValueError(
            f"Expected a checkpoint, {options.checkpoint!r} is a packed file already, for --to onnx or state-dict."
        )
    open_file = _open_packed if packed else partial(_open, trusted=options.trust)
    model = open_file(options.model, options.checkpoint).eval()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        _write(model, options, codes=options.checkpoint if packed else None)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"selfcompress: {warning.message}", file=sys.stderr)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


def _write(model: nn.Module, options: argparse.Namespace, *, codes: str | None) -> None:
    if options.to == "packed":
        export(model, options.out, floats=torch.float16 if options.float16 else torch.float32)
    elif options.to == "onnx":
        try:
            settings: dict[str, Any] = {
                "weights": options.weights or WEIGHTS[0],
                "round_to": options.round_to or 1,
                "codes": codes,
            }
            report = to_onnx(model, options.out, *options.input, fastest=options.fastest, **settings)
            if options.fastest:
                print(report, file=sys.stderr)
        except ModuleNotFoundError as error:  # the error says what to install
            raise ValueError(str(error)) from error
    else:
        write_beside(options.out, lambda part: torch.save(finalize(model).state_dict(), part))


def _diff(options: argparse.Namespace) -> int:
    a, b = (read_contents(path, trusted=options.trust) for path in (options.a, options.b))
    found = differences(a, b)
    if options.json:
        print(json.dumps(differences_values(a, b, found), indent=2, allow_nan=False), flush=True)
    else:
        print(differences_text(a, b, found, width=line_width()), flush=True)
    return DIFFERENT if found else 0


def _report(options: argparse.Namespace) -> int:
    check_path(options.out)
    history = read_run(options.run, metric=options.metric, mode=options.mode)
    checkpoint = options.checkpoint or last_checkpoint(options.run)
    if options.model and checkpoint is None:
        raise ValueError(f"Expected a checkpoint in {str(options.run)!r} for --model. Name one with --checkpoint.")
    if options.model and checkpoint is not None:
        history = with_model(history, checkpoint, _open(options.model, str(checkpoint), trusted=options.trust))
    elif checkpoint is not None:
        history = with_checkpoint(history, checkpoint, trusted=options.trust)
    write_page(report_page(history), options.out)
    for note in history.notes:
        print(f"selfcompress: {note}", file=sys.stderr)
    print(f"{options.out}: {len(history.layers)} layers, bits at {len(history.frames)} epochs")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    values: tuple[Value, ...] = tuple(options.gamma or options.target_size)
    argument: Argument = "gamma" if options.gamma else "target_size"
    command = tuple(options.training)
    runs, failed = run_sweep(Sweep(command, argument, values, options.out, options.metric, options.mode))
    if runs:
        again = f"selfcompress {shlex.join(sys.argv[1:])}"
        write_page(sweep_page(runs, again, options.out), options.out / "sweep.html")
        print(f"\n{sweep_table(runs)}\n\n{options.out / 'sweep.html'}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(values)} runs failed: {', '.join(failed)}. The same command tries again."
        )
    return 0


def _is_packed(file: str, *, trusted: bool) -> bool:
    return read_contents(file, trusted=trusted).kind == "packed"  # read_contents also reports a damaged file


def _open(name: str, checkpoint: str, *, trusted: bool) -> nn.Module:
    """Returns the network of a checkpoint; the output of its code goes to stderr."""
    if not trusted:
        _check_hyperparameters(checkpoint)
    with redirect_stdout(sys.stderr):
        wanted = module_class(name)
        try:
            trust = {"weights_only": False} if trusted else {}
            return load_from_checkpoint(wanted, checkpoint, map_location="cpu", **trust)
        except TypeError as error:
            raise ValueError(
                f"Expected to make a {wanted.__name__} of what the checkpoint holds: {error}. Call "
                f"save_hyperparameters() in its __init__, or give the arguments defaults."
            ) from error


def _check_hyperparameters(checkpoint: str) -> None:
    """Refuses hyperparameters that make Lightning import the code they name, as LightningCLI's hyperparameters may."""
    saved = read_checkpoint(checkpoint)
    for key in ("hyper_parameters", "hparams", "module_arguments"):  # the keys that Lightning reads
        values = saved.get(key)
        if isinstance(values, Mapping) and "_instantiator" in values:
            raise CheckpointError(
                f"Expected hyperparameters of plain values in {checkpoint!r}, found some that name code to import "
                f"(_instantiator={values['_instantiator']!r}). Add --trust if you know where the file comes from."
            )


def _open_packed(name: str, file: str) -> nn.Module:
    """Returns the network of a packed file; its class is called without arguments."""
    with redirect_stdout(sys.stderr):
        wanted = module_class(name)
        try:
            model = wanted()
        except TypeError as error:
            raise ValueError(
                f"Expected to make a {wanted.__name__} without arguments, which a packed file does not hold: {error}. "
                f"Take its checkpoint."
            ) from error
        return load(file, into=model)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "inspect": _inspect,
    "export": _export,
    "diff": _diff,
    "report": _report,
    "sweep": _sweep,
}
