"""Files that are written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def write_beside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and then renamed, so that no half of it is ever there.

    Args:
        path: The file. A link stays one, and what it leads to is written.
        write: Writes it, to the path that it is called with.

    Raises:
        IsADirectoryError: If the path is a folder's.
        FileExistsError: If it is a device's, a pipe's or the like, which would be replaced.
        FileNotFoundError: If there is no folder to write it to.
        OSError: If it cannot be written.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Expected a path for a file, this is a folder", os.fspath(path))
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder for this file, create it first", os.fspath(path))
    if place.exists() and not place.is_file():
        raise FileExistsError(errno.EEXIST, "Expected a path for a file, this is a device or a pipe", os.fspath(path))
    part = place.with_name(f"{place.name[:200]}.{uuid4().hex[:8]}.part")  # another's for each that writes this file
    try:
        write(part)
        if place.exists():
            shutil.copymode(place, part)
        part.replace(place)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.filename is not None
        ):  # the error names the user's path, not the one beside it
            error.filename = os.fspath(path)
        raise
