"""Checks that a file is what it seems: a regular file, whose content takes about as much memory as the file is long."""

import errno
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_selfcompress.errors import CheckpointError

_TIMES = 8  # how much larger than its file a checkpoint's tensors may be, since several may share memory
_FREE = 1 << 20  # bytes that are never too many


def check_regular(path: str | os.PathLike[str]) -> None:
    """Checks that a path is a file with an end.

    Args:
        path: The path.

    Raises:
        OSError: If it is a device, a pipe or a socket, if it does not exist, or if its links lead round in a circle.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is a device, a pipe or a socket", os.fspath(path))


def check_members(path: Any) -> None:
    """Checks that a checkpoint's members are stored as they are, as torch writes them.

    Args:
        path: A local file; anything else is passed over.

    Raises:
        CheckpointError: If a member is compressed: a small file could then hold any amount of data.
    """
    if not isinstance(path, str | os.PathLike) or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise CheckpointError(
                    f"Expected members that are stored uncompressed in {str(path)!r}, as torch.save writes them, found "
                    f"{member.filename!r}, {member.file_size:,} bytes in {member.compress_size:,}. Unpack the file and "
                    f"save the checkpoint anew, if you trust it."
                )


def check_tensors(values: Any, path: Any) -> None:
    """Checks the tensors of a checkpoint, before anything is computed of them.

    Args:
        values: The content of the checkpoint.
        path: Its file, for messages and for its size.

    Raises:
        CheckpointError: If a tensor has no values (``meta``), is sparse or quantized by torch, or if the tensors
            together take much more memory than the file is long, as an expanded tensor does.
    """
    size = os.stat(path).st_size if isinstance(path, str | os.PathLike) else None
    total, seen = 0, set()
    for name, tensor in _named_tensors(values):
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise CheckpointError(f"Expected names of whole characters in {str(path)!r}, found {name!r}. Rename it.")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "meta" if tensor.is_meta else str(tensor.layout if not tensor.is_quantized else tensor.dtype)
            raise CheckpointError(
                f"Expected tensors with all their values in {str(path)!r}, found {name!r}, a {kind} tensor of shape "
                f"{tuple(tensor.shape)}. Save it dense (tensor.to_dense()), or leave it out."
            )
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        total += 0 if place in seen else tensor.nbytes
        seen.add(place)
        if size is not None and total > _TIMES * size + _FREE:
            raise CheckpointError(
                f"Expected tensors of about {size:,} bytes in {str(path)!r}, found more than {total:,} with {name!r} "
                f"of shape {tuple(tensor.shape)}. It was expanded, or shares memory with many others: save "
                f"tensor.clone()."
            )


def _named_tensors(values: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested dictionaries and lists, each with the keys on the way to it."""
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping) and depth < 50:
        for key, value in values.items():
            yield from _named_tensors(value, f"{name}.{key}".lstrip("."), depth + 1)
    elif isinstance(values, list | tuple) and depth < 50:
        for i, value in enumerate(values):
            yield from _named_tensors(value, f"{name}[{i}]", depth + 1)
