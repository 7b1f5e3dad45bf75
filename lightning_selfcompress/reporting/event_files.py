"""What TensorBoard's event files of one run hold: scalars, and the bits of channels."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from lightning_selfcompress.errors import RunError
from lightning_selfcompress.reporting.history import CHANNEL_BITS, BitsFrame, Series

PATTERN = "events.out.tfevents.*"
_FRAME = struct.Struct("<QI")  # before each record: its length, and the checksum of the length


def read_event_files(files: Sequence[Path]) -> tuple[dict[str, Series], tuple[BitsFrame, ...]]:
    """Reads all event files of one run. A run that was resumed has several; where steps overlap, the later file counts.

    Args:
        files: The event files of one folder, the earliest first.

    Returns:
        Tag of each scalar -> its values; the bits of all channels at the end of each epoch.

    Raises:
        RunError: If a file is damaged. A last record that was cut off while it was written is left out.
    """
    scalars: dict[str, dict[int, float]] = {}
    bits: dict[int, dict[str, Tensor]] = {}
    for file in files:
        for event in _events(file):
            for value in event.summary.value:
                if not value.HasField("tensor"):
                    continue
                if value.tag.startswith(CHANNEL_BITS):
                    name = value.tag.removeprefix(CHANNEL_BITS)
                    bits.setdefault(event.step, {})[name] = torch.from_numpy(make_ndarray(value.tensor).copy())
                elif not value.tensor.tensor_shape.dim and value.tensor.float_val:
                    scalars.setdefault(value.tag, {})[event.step] = float(value.tensor.float_val[0])
    frames = tuple(BitsFrame(step, bits[step]) for step in sorted(bits))
    return {tag: Series.of(points) for tag, points in scalars.items()}, frames


def _events(file: Path) -> Iterator[Any]:
    """Yields the events of a file, and raises at its end if there are more than could be read."""
    whole = _whole_records(file)
    read = 0
    for event in EventFileLoader(str(file)).Load():  # which ends without a word at the first record that is damaged
        read += 1
        yield event
    if read < whole:
        raise _damaged(file, read)


def _whole_records(file: Path) -> int:
    """Counts the records of a file by their lengths."""
    count = 0
    with file.open("rb") as stream:
        size = file.stat().st_size
        while len(head := stream.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            if masked_crc32c(head[:8]) != checksum:
                raise _damaged(file, count)
            if stream.tell() + length + 4 > size:  # it was cut off
                break
            stream.seek(length + 4, 1)
            count += 1
    return count


def _damaged(file: Path, good: int) -> RunError:
    return RunError(
        f"Expected TensorBoard events in {str(file)!r}, found a damaged record after {good} good ones. Take another "
        f"copy of the file, or move it out of the folder to report what the others hold."
    )
