"""The command ``selfcompress``."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_selfcompress.cli.contents import read_contents, with_network
from lightning_selfcompress.cli.differences import differences
from lightning_selfcompress.cli.model_class import look_here, module_class
from lightning_selfcompress.cli.text import contents_text, contents_values, differences_text, differences_values
from lightning_selfcompress.demo.data import DATA_VARIABLE
from lightning_selfcompress.demo.run import TASKS, Settings, run_demo, summary
from lightning_selfcompress.errors import CheckpointError, DataError
from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.files.checkpoint import load_from_checkpoint
from lightning_selfcompress.files.export import export
from lightning_selfcompress.files.finalize import finalize
from lightning_selfcompress.files.load import load
from lightning_selfcompress.onnx.export import WEIGHTS, to_onnx
from lightning_selfcompress.tables import line_width

DIFFERENT = 2  # exit status of diff where files differ; that of errors is 1, of all commands


LONGEST_ERROR = 600  # characters; torch lists every key of a state dict that does not fit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of the command line.

    Args:
        arguments: What follows the program's name; None takes the process's own.

    Returns:
        Exit status: 0; 1 where something was wrong; 2 where ``diff`` found that files differ; 130 where the user broke
        off.
    """
    options = parser().parse_args(arguments)
    if getattr(options, "trust", False):
        look_here()  # where the classes of a checkpoint's objects may lie
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"selfcompress: {_one_line(error)}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the status of other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}. See {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    root = _Parser(prog="selfcompress", description="Networks that compress themselves in training.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_diff(commands)
    return root


_Commands = argparse._SubParsersAction  # its only name


def _command(
    commands: "_Commands[_Parser]", name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str = ""
) -> _Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=f"{summary}\n{more}", formatter_class=formatter)
    command.add_argument("--debug", action="store_true", help="show where an error comes from")
    command.set_defaults(run=run)
    return command


def _add_demo(commands: "_Commands[_Parser]") -> None:
    demo = _command(commands, "demo", _demo, "train a small network on real images, in float and compressed")
    demo.add_argument("--data", choices=sorted(TASKS), default="digits", help="images to train on (default: digits)")
    demo.add_argument("--data-dir", type=Path, help=f"folder with MNIST's files (default: ${DATA_VARIABLE})")
    demo.add_argument("--epochs", type=_positive, help="epochs of each training (default: the data's own)")
    demo.add_argument("--gamma", type=float, help="loss per bit of the average weight (default: the data's own)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs"), help="where the run gets its folder (default: runs)")
    demo.add_argument("--resume", type=Path, metavar="RUN", help="go on with the interrupted run in this folder")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_inspect(commands: "_Commands[_Parser]") -> None:
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "show what a packed file or a checkpoint holds: layers, channels, bits, bytes",
        """
A checkpoint is shown as the packed file that it would be. bits are those of each weight left as an integer code of one
width a channel, channels those with a code that is not 0, bytes those of entropy-coded codes and scales. What bits were
learned is known of checkpoints only.

keys of --json: file, kind (packed, checkpoint), nbytes, packed_nbytes,
  head: format_version | lightning_version, epoch, global_step
  layers: name, shape, channels, channels_stored, weights, learned_bits, bits, max_bits, nbytes, note
  uncompressed: name, shape, dtype, stored_as, nbytes
  histogram: bits a code needs -> channels
What is not known is null.""",
    )
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--model", metavar="package.module:Class", help="class of a checkpoint, for exact bytes")
    inspect.add_argument("--json", action="store_true", help="for machines")
    inspect.add_argument("--trust", action="store_true", help=_TRUST)


def _add_export(commands: "_Commands[_Parser]") -> None:
    made = _command(commands, "export", _export, "write the network of a checkpoint into a file")
    made.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a checkpoint; for --to onnx and state-dict also a packed file, if the class needs no arguments",
    )
    made.add_argument(
        "--model", required=True, metavar="package.module:Class", help="the LightningModule, found from here"
    )
    made.add_argument("-o", "--out", required=True, type=Path, metavar="FILE")
    made.add_argument(
        "--to",
        choices=("packed", "onnx", "state-dict"),
        default="packed",
        help="packed: integer codes, for load() (default); onnx: needs --input; state-dict: of the plain, smaller "
        "network, for torch.load",
    )
    made.add_argument("--float16", action="store_true", help="packed: biases and the like in two bytes each")
    made.add_argument(
        "--input",
        action="append",
        type=_example,
        metavar="SHAPE[:DTYPE]",
        help="onnx: shape of an input, such as 1,1,28,28 or 1,128:int64; once for each",
    )
    made.add_argument(
        "--round-to",
        type=_positive,
        metavar="N",
        help="onnx: have the runtime round widths up to multiples, 16 for ONNX Runtime's fast convolutions",
    )
    made.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="onnx: as codes behind DequantizeLinear (default); as codes multiplied by their scales, which a runtime "
        "computes once; or as floats",
    )
    made.add_argument("--trust", action="store_true", help=_TRUST)


def _add_diff(commands: "_Commands[_Parser]") -> None:
    diff = _command(
        commands,
        "diff",
        _diff,
        "compare two packed files or checkpoints",
        """
What is compared is what packed files of both would hold: shapes, bits, bytes and values. Optimizers and learned
bits are not compared.

exit status: 0 if they hold the same network, 2 if they differ, 1 if something is wrong

keys of --json: a and b (file, kind, nbytes, packed_nbytes), equal,
  differences: name, a and b (shape, dtype, stored_as, bits, nbytes; null where it is absent), largest
bits are null where it is not compressed; largest is the largest difference of two values, null where shapes
differ or it is not finite.""",
    )
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--json", action="store_true", help="for machines")
    diff.add_argument("--trust", action="store_true", help=_TRUST)


_TRUST = "make Python objects that the checkpoint holds, which runs its code"


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
    for name, value in (("--round-to", options.round_to), ("--weights", options.weights)):
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
            weights, round_to = options.weights or WEIGHTS[0], options.round_to or 1
            to_onnx(model, options.out, *options.input, weights=weights, round_to=round_to, codes=codes)
        except ModuleNotFoundError as error:  # which says what to install
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


def _is_packed(file: str, *, trusted: bool) -> bool:
    return read_contents(file, trusted=trusted).kind == "packed"  # which also names what is wrong with the file


def _open(name: str, checkpoint: str, *, trusted: bool) -> nn.Module:
    """The network of a checkpoint; whatever its code prints goes to stderr."""
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


def _open_packed(name: str, file: str) -> nn.Module:
    """The network of a packed file, made without arguments."""
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


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        text = f"Expected {str(error.filename)!r} to be a file that can be used: {error.strerror}. Check the path."
    elif isinstance(error, OSError | ValueError | DataError | CheckpointError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    text = " ".join(text.split())
    half = LONGEST_ERROR // 2
    return text if len(text) <= LONGEST_ERROR else f"{text[:half]} ... {text[-half:]}"


def _example(text: str) -> Tensor:
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(n) for n in shape.split(",")]
    except ValueError:
        sizes = []
    if not isinstance(dtype, torch.dtype) or not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected a shape such as 1,1,28,28 or 1,128:int64, got {text}")
    if dtype.is_floating_point:  # of zeros much would look as if it could be folded
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(sizes, dtype=dtype)


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number

