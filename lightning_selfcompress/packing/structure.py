"""What writing and reading a packed file have in common. ``docs/format.md`` describes it for other readers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_selfcompress.packing import rans

MAGIC = b"SCNN"


VERSION = 1


RAW, HALF, CODED, INT8, INT16, INT32 = range(6)  # how a tensor is stored: unchanged, as codes, or in a narrower type


NARROW = {HALF: torch.float16, INT8: torch.int8, INT16: torch.int16, INT32: torch.int32}


WIDER = {
    HALF: (torch.float32,),
    INT8: (torch.int16, torch.int32, torch.int64),
    INT16: (torch.int32, torch.int64),
    INT32: (torch.int64,),
}


LEAVES = (
    "",  # any other
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


MOST_CLASSES = 64


MOST_DIMS = 16


MOST_ENTRIES = 1 << 40


LONGEST_NAME = 1 << 10  # bytes, so that names of shared beginnings cannot grow without end


Integers = NDArray[Any]


class Alphabets(NamedTuple):
    """How many different classes, exponents, bounds and symbols of weights a tensor may have."""

    classes: int = 1
    exponents: int = 1
    bounds: int = 1
    symbols: int = 1


PARTS = 3  # of each tensor in the channel stream


def channel_parts(alphabets: Alphabets, channels: int) -> list[rans.Part]:
    """All classes of a tensor, then all exponents, then all bounds."""
    contexts = np.zeros(channels, np.uint8)
    return [rans.Part(contexts, 1, alphabet) for alphabet in alphabets[:PARTS]]


def weight_part(alphabets: Alphabets, classes: Integers, row: int) -> rans.Part:
    """The weights of a tensor, with a table for each class."""
    contexts = np.tile((classes[classes > 0] - 1).astype(np.uint8), row)
    return rans.Part(contexts, max(alphabets.classes - 1, 1), alphabets.symbols)


def entries(shape: Sequence[int]) -> int:
    """Entries of a tensor; sizes of 0 count as 1, so that the others are bounded too."""
    return math.prod(max(n, 1) for n in shape)


def path_and_leaf(name: str) -> tuple[str, int]:
    """The module's path and the number of the last part; the whole name and 0 where that is not a usual one."""
    path, dot, leaf = name.rpartition(".")
    return (path, LEAVES.index(leaf)) if dot and leaf in LEAVES[1:] else (name, 0)
