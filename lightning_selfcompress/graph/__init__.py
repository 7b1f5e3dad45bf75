"""The channel graph: which channels of a network live and die together, read off its own training steps."""

from lightning_selfcompress.graph.channels import (
    NORMS,
    Channels,
    Slot,
    is_bare_norm,
    name_of,
    own_tensors,
    size_attribute,
    stored_tensors,
)
from lightning_selfcompress.graph.watch import Watcher

__all__ = [
    "NORMS",
    "Channels",
    "Slot",
    "Watcher",
    "is_bare_norm",
    "name_of",
    "own_tensors",
    "size_attribute",
    "stored_tensors",
]
