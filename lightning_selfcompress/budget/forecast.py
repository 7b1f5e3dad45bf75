"""The size that a network will have once its dead channels are gone."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.packing import PackedSize, estimated_size
from lightning_selfcompress.removal.plan import dead_channels


def forecast(model: nn.Module, channels: Channels | None, *, narrow: bool = True) -> PackedSize:
    """Estimates the parts of the size of a model's packed file after the removal of its dead channels.

    Args:
        model: A converted module.
        channels: The channels of the module; None if they are not known, so that none will be removed.
        narrow: Whether vectors in float count as the landing will round them.
    """
    return estimated_size(model, living(model, channels) if channels is not None else None, narrow=narrow)


def living(model: nn.Module, channels: Channels) -> Mapping[str, Mapping[int, Tensor]]:
    """Returns the positions that stay once dead channels are gone: name of a tensor -> dimension -> positions, int64.

    Dimensions that stay whole are left out.

    Args:
        model: A converted module.
        channels: The channels of the module.
    """
    dead = dead_channels(model, channels) & channels.removable()
    found: dict[str, dict[int, Tensor]] = {}
    for slot in channels.slots if dead.any() else ():
        stays = np.flatnonzero(~dead[channels.group[slot.atoms]])
        if len(stays) < slot.size and not slot.attribute:
            found.setdefault(slot.name, {})[slot.dim] = torch.from_numpy(stays if len(stays) else np.zeros(1, np.int64))
    return found
