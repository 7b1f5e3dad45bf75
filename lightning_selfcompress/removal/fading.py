"""Fading, which takes the constants of dead channels to zero over several steps before the channels are removed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.tensors import stored_tensors


class Fading:
    """Takes biases, scales and shifts of dead channels linearly to zero, and holds them there.

    A dead channel still emits its bias through its normalization and activation. Only channels that may be removed
    fade. The computation runs on the device of the bit depths, without synchronization on a GPU.

    Args:
        model: A converted module.
        channels: The channels of the module.
        steps: Number of steps from the death of a channel until its constants are zero, >= 1.
        left: The attribute ``left`` of an earlier instance for the same channels, to continue its fading; some of the
            channels may have been removed since.

    Attributes:
        left: Number of steps that each channel has left, ``(channels.count,)``, float32.

    Raises:
        ValueError: If ``steps`` is below 1.
    """

    def __init__(self, model: nn.Module, channels: Channels, *, steps: int = 50, left: Tensor | None = None) -> None:
        if steps < 1:
            raise ValueError(f"Expected steps >= 1, got {steps!r}.")
        tensors = stored_tensors(model)
        removable = channels.removable()
        producing = [s for s in channels.slots if s.produces and removable[channels.group[s.atoms]].any()]
        fading = [s for s in channels.slots if s.fades and removable[channels.group[s.atoms]].any()]
        self._depths = [tensors[s.name] for s in producing]
        self._vectors = [tensors[s.name] for s in fading]
        device = self._depths[0].device if self._depths else torch.device("cpu")
        self._produced = _groups(channels, producing, device)
        self._faded = _groups(channels, fading, device)
        self._removable = torch.from_numpy(removable).to(device)
        self.left = torch.full((channels.count,), float(steps), device=device)
        if left is not None:
            self.left.copy_(left[: channels.count])

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step of the fading. Call it after each step of the optimizers."""
        if not self._vectors or not self._depths:
            return
        depth = bit_depth(torch.cat([d.to(self.left) for d in self._depths]))
        if depth.device.type == "cpu" and bool(depth.all()):
            return  # no channel is dead; on other devices this check would wait for the device
        alive = torch.zeros_like(self._removable)
        alive[self._produced[depth > 0]] = True
        dying = self._removable & ~alive
        factor = torch.where(dying, (1 - 1 / self.left.clamp(min=1)), 1.0)
        self.left -= dying.to(self.left)
        factors = factor[self._faded].split([v.numel() for v in self._vectors])
        for vector, along in zip(self._vectors, factors, strict=True):
            vector.mul_(along.view(vector.shape).to(vector))


def _groups(channels: Channels, slots: Sequence[Slot], device: torch.device) -> Tensor:
    """Returns the channel of every position in the slots, as one concatenated tensor."""
    groups = [channels.group[s.atoms] for s in slots]
    return torch.from_numpy(np.concatenate(groups) if groups else np.zeros(0, np.int64)).to(device)
