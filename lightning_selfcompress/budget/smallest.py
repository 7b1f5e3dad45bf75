"""The smallest size that a network can have."""

import torch
from torch import nn

from lightning_selfcompress.budget.landing import file_nbytes
from lightning_selfcompress.budget.vectors import round_vectors
from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.tensors import copy_module, stored_tensors


@torch.no_grad()
def smallest_nbytes(model: nn.Module, channels: Channels | None, *, round_to: int = 1) -> int:
    """Returns the bytes of a model's packed file with all channels gone that can go, and all codes zero.

    Args:
        model: A converted module, which is not changed.
        channels: The channels of the module; None if none can be removed.
        round_to: Numbers of output channels are kept at multiples of this number.
    """
    copied = copy_module(model)
    learned, names = learned_tensors(copied), stored_tensors(copied)
    for tensor in learned.values():
        tensor.zero_()
    if channels is not None:
        for slot in channels.slots:
            if slot.fades:
                names[slot.name].zero_()
        remove(copied, plan_removal(copied, channels, round_to=round_to).edits)
    round_vectors(copied)
    return file_nbytes(copied)
