"""Atomic writes: a file is written completely or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name in the same folder and renames it, so that no partial file ever appears.

    Args:
        path: The file. If the path is a link, the link stays and its target is written.
        write: A function that writes the content to the path that it is called with.

    Raises:
        IsADirectoryError: If the path is a folder.
        FileExistsError: If the path is a device, a pipe or another special file, which the rename would replace.
        FileNotFoundError: If the folder of the file does not exist.
        OSError: If the file cannot be written.
    """
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(errno.ELOOP, "Expected a path for a file, this link leads round in a circle", os.fspath(path))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Expected a path for a file, this is a folder", os.fspath(path))
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder for this file, create it first", os.fspath(path))
    if place.exists() and not place.is_file():
        raise FileExistsError(errno.EEXIST, "Expected a path for a file, this is a device or a pipe", os.fspath(path))
    start = os.fsdecode(os.fsencode(place.name)[:200].decode(errors="ignore"))  # names have 255 bytes at most
    part = place.with_name(f"{start}.{uuid4().hex[:8]}.part")  # every writer has its own
    try:
        write(part)
        if place.exists():
            shutil.copymode(place, part)
        part.replace(place)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            # the error names the user's path instead of the temporary path
            error.filename = os.fspath(path)
        raise
