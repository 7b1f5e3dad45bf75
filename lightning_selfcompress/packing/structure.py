"""The packed file format, as far as writing and reading share it; ``docs/format.md`` describes the whole format."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_selfcompress.packing import rans

MAGIC = b"SCNN"


VERSION = 1


RAW, HALF, CODED, INT8, INT16, INT32 = range(6)  # storages of a tensor: unchanged, as codes, or in a narrower type


NARROW = {HALF: torch.float16, INT8: torch.int8, INT16: torch.int16, INT32: torch.int32}


WIDER = {
    HALF: (torch.float32,),
    INT8: (torch.int16, torch.int32, torch.int64),
    INT16: (torch.int32, torch.int64),
    INT32: (torch.int64,),
}


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


MOST_CLASSES = 64


MOST_DIMS = 16


MOST_ENTRIES = 1 << 40


LONGEST_NAME = 1 << 10  # bytes of a path; without a limit, names that share bytes could need endless memory


Integers = NDArray[Any]


class Alphabets(NamedTuple):
    """The numbers of possible classes, exponents, bounds and symbols of weights in a coded tensor."""

    classes: int = 1
    exponents: int = 1
    bounds: int = 1
    symbols: int = 1


PARTS = 3  # parts that each coded tensor has in the channel stream


def channel_parts(alphabets: Alphabets, channels: int) -> list[rans.Part]:
    """Returns the parts of a tensor in the channel stream: its classes, its exponents and its bounds."""
    contexts = np.zeros(channels, np.uint8)
    return [rans.Part(contexts, 1, alphabet) for alphabet in alphabets[:PARTS]]


def weight_part(alphabets: Alphabets, classes: Integers, row: int) -> rans.Part:
    """Returns the part of a tensor in the weight stream, which has one table for each class other than 0."""
    contexts = np.tile((classes[classes > 0] - 1).astype(np.uint8), row)
    return rans.Part(contexts, max(alphabets.classes - 1, 1), alphabets.symbols)


def entries(shape: Sequence[int]) -> int:
    """Counts the entries of a tensor, with sizes of 0 taken as 1, so that a limit bounds all other sizes too."""
    return math.prod(max(n, 1) for n in shape)


def path_and_leaf(name: str) -> tuple[str, int]:
    """Splits a name into path and number of its last word; an unlisted word has number 0 and stays in the path."""
    path, dot, leaf = name.rpartition(".")
    return (path, LEAVES.index(leaf)) if dot and leaf in LEAVES[1:] else (name, 0)
