"""The errors of this package, all of one base."""


class SelfCompressError(Exception):
    """The base of all errors that are this package's own."""


class CheckpointError(SelfCompressError, RuntimeError):
    """A checkpoint that cannot be read, or does not fit the module it is loaded into."""


class DataError(SelfCompressError, RuntimeError):
    """Data of the demo that is missing or damaged; the message names the file and says what to do."""


class PackedFileError(SelfCompressError, ValueError):
    """A packed file that is damaged, of a later version, or no packed file."""
