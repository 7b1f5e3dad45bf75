"""The parser of the command ``selfcompress``, which imports torch only for ``--input``, so that the help is fast."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_selfcompress import __version__

if TYPE_CHECKING:
    from torch import Tensor

DATA_SETS = ("digits", "mnist")  # the keys of ``demo.run.TASKS``
DATA_VARIABLE = "SELFCOMPRESS_DATA"  # the environment variable that names the folder of MNIST's files
ONNX_WEIGHTS = ("dequantize", "multiply", "float")  # ``onnx.export.WEIGHTS``
_TRUST = "make Python objects that the checkpoint holds, which runs its code"


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with status 1, as for all other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}. See {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    root = _Parser(prog="selfcompress", description="Networks that compress themselves in training.")
    root.add_argument("--version", action="version", version=f"selfcompress {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_diff(commands)
    _add_report(commands)
    _add_sweep(commands)
    return root


_Commands = argparse._SubParsersAction  # argparse has no public name for this class


def _command(commands: "_Commands[_Parser]", name: str, summary: str, more: str = "") -> _Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=f"{summary}\n{more}", formatter_class=formatter)
    command.add_argument("--debug", action="store_true", help="show where an error comes from")
    return command


def _add_demo(commands: "_Commands[_Parser]") -> None:
    demo = _command(commands, "demo", "train a small network on real images, in float and compressed")
    demo.add_argument("--data", choices=DATA_SETS, default="digits", help="images to train on (default: digits)")
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
        "show what a packed file or a checkpoint holds: layers, channels, bits, bytes",
        """
A checkpoint is shown as the packed file that it would be. Whole bits are those of each weight left as an integer code
of one width a channel, max whole those of the widest channel, channels those with a code that is not 0, bytes those of
entropy-coded codes and scales. Learned bits are known of checkpoints only.

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
    made = _command(commands, "export", "write the network of a checkpoint into a file")
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
        choices=ONNX_WEIGHTS,
        help="onnx: as codes behind DequantizeLinear (default); as codes multiplied by their scales, which a runtime "
        "computes once; or as floats",
    )
    made.add_argument(
        "--fastest",
        action="store_true",
        help="onnx: write every form, time it on the example in ONNX Runtime, and keep the fastest",
    )
    made.add_argument("--trust", action="store_true", help=_TRUST)


def _add_diff(commands: "_Commands[_Parser]") -> None:
    diff = _command(
        commands,
        "diff",
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


def _add_report(commands: "_Commands[_Parser]") -> None:
    report = _command(
        commands,
        "report",
        "write one HTML file about a run: curves, the bits of all channels, layers, the front",
        """
RUN is the folder of a logger, with TensorBoard's event files or the metrics.csv of a CSVLogger, such as
lightning_logs/version_0. The layers are those of the checkpoint below it that was written last. A run that had a
CompressionReport among its callbacks has recorded the rest; of another one --model tells it.""",
    )
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("-o", "--out", required=True, type=Path, metavar="FILE")
    _add_metric(report)
    report.add_argument("--checkpoint", type=Path, metavar="CKPT", help="the checkpoint with the layers")
    report.add_argument(
        "--model",
        metavar="package.module:Class",
        help="class of the checkpoint, which tells its size before, and what was not compressed",
    )
    report.add_argument("--trust", action="store_true", help=_TRUST)


def _add_sweep(commands: "_Commands[_Parser]") -> None:
    sweep = _command(
        commands,
        "sweep",
        "run a training script of LightningCLI at several sizes or gammas, and show them in one plot and table",
        """
Each run gets a folder below DIR with its run.yaml, logs, checkpoints and report.html; sweep.html shows all of them. The
same command goes on where it was interrupted: what is done is not run again.

  selfcompress sweep --target-size 2% 5% 10% -- python train.py fit --config train.yaml""",
    )
    goal = sweep.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target-size", nargs="+", type=_size, metavar="SIZE", help="sizes, such as 20KB or 5%%")
    goal.add_argument("--gamma", nargs="+", type=_gamma, metavar="GAMMA", help="losses per bit of the average weight")
    sweep.add_argument("-o", "--out", type=Path, default=Path("sweep"), metavar="DIR", help="folder (default: sweep)")
    _add_metric(sweep)
    sweep.add_argument("training", nargs="+", metavar="-- COMMAND", help="what starts a training, such as the above")


def _add_metric(command: _Parser) -> None:
    command.add_argument(
        "--metric",
        default="",
        metavar="NAME",
        help="metric to set against the bytes, such as val/accuracy (default: what a checkpoint callback "
        "monitors, or the likeliest)",
    )
    command.add_argument("--mode", choices=("min", "max"), help="whether a good metric is small or large")


def _example(text: str) -> "Tensor":
    import torch

    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(n) for n in shape.split(",")]
    except ValueError:
        sizes = []
    if not isinstance(dtype, torch.dtype) or not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected a shape such as 1,1,28,28 or 1,128:int64, got {text}")
    if dtype.is_floating_point:  # zeros could hide that a fold changes the outputs
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(sizes, dtype=dtype)


def _size(text: str) -> str:
    from lightning_selfcompress.budget.target import target_nbytes

    try:
        target_nbytes(text, 1 << 62)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)[:1].lower() + str(error)[1:].rstrip(".")) from error
    return text


def _gamma(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite gamma >= 0, got {text}")
    return number


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number
