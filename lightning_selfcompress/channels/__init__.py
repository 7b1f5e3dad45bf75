"""The channel graph of a network: groups of channels that live and die together, read from its training steps."""

from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.channels.watch import Watcher

__all__ = ["Channels", "Slot", "Watcher"]
