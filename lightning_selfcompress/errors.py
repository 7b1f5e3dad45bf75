"""The exceptions of this package, which share one base class."""


class SelfCompressError(Exception):
    """The base class of all exceptions that this package defines."""


class CheckpointError(SelfCompressError, RuntimeError):
    """Raised when a checkpoint cannot be read, or does not fit the module that loads it."""


class DataError(SelfCompressError, RuntimeError):
    """Raised when data of the demo is missing or damaged; the message names the file and says what to do."""


class RunError(SelfCompressError, ValueError):
    """Raised when the folder of a run cannot be read: its event files are damaged, or it is no run of this package."""


class PackedFileError(SelfCompressError, ValueError):
    """Raised when a file is damaged, is of another format version, or is not a packed file."""
