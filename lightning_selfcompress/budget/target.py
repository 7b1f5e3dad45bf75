"""The size that a user asks for, in bytes or as a share of the float network."""

import re

UNITS = {"": 1, "b": 1, "kb": 1 << 10, "kib": 1 << 10, "mb": 1 << 20, "mib": 1 << 20, "gb": 1 << 30, "gib": 1 << 30}


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[a-z]*)")


_EXPECTED = 'Expected target_size in bytes (51_200), with a unit of 1024 ("50KB", "1.5 MB"), or as a share of the float'


def target_nbytes(size: int | float | str, float_nbytes: int) -> int:
    """Reads a size.

    >>> from lightning_selfcompress.budget.target import target_nbytes
    >>> [target_nbytes(size, 2_000_000) for size in (51_200, "50KB", "50 kb", "3%")]
    [51200, 51200, 51200, 60000]

    Args:
        size: A number of bytes, or text with a unit (B, KB, MB, GB; a KB is 1024 bytes) or a percentage of the float
            network.
        float_nbytes: Bytes of the float network.

    Returns:
        The size in whole bytes, rounded down.

    Raises:
        TypeError: If the size is neither a number nor text.
        ValueError: If the size cannot be read, is not above 0, or is a share above 100%.
    """
    if isinstance(size, bool) or not isinstance(size, int | float | str):
        raise TypeError(f'{_EXPECTED} network ("3%"), got {size!r}.')
    found = _SIZE.fullmatch(str(size).strip().lower().replace("_", ""))
    number, unit = (float(found[1]), found[2]) if found else (0.0, "?")
    if unit == "%" and 0 < number <= 100:
        nbytes = number / 100 * float_nbytes
    elif unit in UNITS and number > 0:
        nbytes = number * UNITS[unit]
    else:
        raise ValueError(f'{_EXPECTED} network, above 0 and at most 100% ("3%"), got {size!r}.')
    if nbytes < 1:
        raise ValueError(f'{_EXPECTED} network ("3%"), at least one byte, got {size!r}.')
    return int(nbytes)
