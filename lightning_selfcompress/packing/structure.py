"""The packed file format, as far as writing and reading share it; ``docs/format.md`` describes the whole format."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_selfcompress.packing import rans
from lightning_selfcompress.packing.levels import Classes
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS

MAGIC = b"SCNN"


VERSION = 1


EXPONENT_LIMIT = 128 * EXPONENT_STEPS  # exponents go from -limit to limit - 1 sixteenths, as in ``step_size``


EXPONENT_BEFORE = -64  # the first exponent of a coded tensor is written as a difference; this stands before all of them


LEAVES = (
    "",  # any other last word
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "in_proj_weight",
    "in_proj_bias",
    "groups",
    "num_features",
    "num_groups",
)


WEIGHT, BIAS = LEAVES.index("weight"), LEAVES.index("bias")


LEAF_MASK, SAME_PATH, FORM_SHIFT = 15, 16, 5  # of the first byte of a tensor head


DROPPED = 7  # bytes of the earlier path that are left out in a new path; this and more take another number


GENERAL, PLAIN_CODED, WITH_BIAS = 0, 1, 7  # forms of a tensor head; the other forms are those of VECTOR_FORMS


CHANNELS_BEFORE, SQUARE = 32, 64  # added to the number of dimensions in a plain head, where they hold for the shape


MOST_DIMS = 16


MOST_ENTRIES = 1 << 40


LONGEST_NAME = 1 << 10  # bytes of a path; without a limit, names that share bytes could need endless memory


Integers = NDArray[Any]


class Alphabets(NamedTuple):
    """The kinds of a coded tensor's classes, and the numbers of possible exponents, bounds and symbols."""

    classes: Classes = Classes()
    exponents: int = 1
    bounds: int = 1
    symbols: int = 1


def class_part(alphabets: Alphabets, channels: int) -> rans.Part:
    """Returns the part of the classes of a tensor's channels."""
    return rans.Part(np.zeros(channels, np.uint8), 1, alphabets.classes.number)


def channel_parts(alphabets: Alphabets, living: int) -> list[rans.Part]:
    """Returns the parts of the exponents and the bounds of the channels that are not of class 0."""
    contexts = np.zeros(living, np.uint8)
    return [rans.Part(contexts, 1, alphabet) for alphabet in (alphabets.exponents, alphabets.bounds)]


def weight_part(alphabets: Alphabets, classes: Integers, row: int) -> rans.Part:
    """Returns the part of a tensor's symbols, which has one table for each class other than 0."""
    contexts = np.tile((classes[classes > 0] - 1).astype(np.uint8), row)
    start = alphabets.classes.start_counts(alphabets.symbols)
    return rans.Part(contexts, len(start), alphabets.symbols, start=start)


def entries(shape: Sequence[int]) -> int:
    """Counts the entries of a tensor, with sizes of 0 taken as 1, so that a limit bounds all other sizes too."""
    return math.prod(max(n, 1) for n in shape)


def path_and_leaf(name: str) -> tuple[str, int]:
    """Splits a name into path and number of its last word; an unlisted word has number 0 and stays in the path."""
    path, dot, leaf = name.rpartition(".")
    return (path, LEAVES.index(leaf)) if dot and leaf in LEAVES[1:] else (name, 0)
