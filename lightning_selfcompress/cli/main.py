"""The entry point of ``selfcompress``, which runs a subcommand and returns the exit status."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lightning_selfcompress.cli.parser import parser
from lightning_selfcompress.errors import SelfCompressError

LONGEST_ERROR = 600  # characters; torch lists every key of a state dict that does not fit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the arguments name.

    Args:
        arguments: The arguments after the program's name; None takes the arguments of the process.

    Returns:
        The exit status: 0 on success; 1 on an error; 2 if ``diff`` found a difference; 130 if the user interrupted the
        command.
    """
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file may hold names that no terminal can show
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            raise
        print(f"selfcompress: {_one_line(error)}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    """Imports the subcommands, which takes longer than to print the help, and runs one of them."""
    from lightning_selfcompress.cli.commands import COMMANDS
    from lightning_selfcompress.cli.model_class import look_here

    if getattr(options, "trust", False):
        look_here()  # the classes of a checkpoint's objects may lie in the current folder
    return COMMANDS[options.command](options)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        text = f"Expected {str(error.filename)!r} to be a file that can be used: {error.strerror}. Check the path."
    elif isinstance(error, OSError | ValueError | SelfCompressError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    text = " ".join(text.split())
    half = LONGEST_ERROR // 2
    return text if len(text) <= LONGEST_ERROR else f"{text[:half]} ... {text[-half:]}"
