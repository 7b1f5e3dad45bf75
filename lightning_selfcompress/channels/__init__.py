"""The channel graph: which channels of a network live and die together, read off its own training steps."""

from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.channels.watch import Watcher

__all__ = ["Channels", "Slot", "Watcher"]
