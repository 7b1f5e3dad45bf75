"""The position of the output channels in a weight, and a weight arranged by them."""

from dataclasses import dataclass

from torch import Tensor

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.tensors import whole


@dataclass(frozen=True)
class ChannelAxis:
    """The position of the output channels in a weight.

    >>> import torch
    >>> from lightning_selfcompress import ChannelAxis
    >>> ChannelAxis(dim=1).channels(torch.zeros(8, 16))  # (in, out)
    16
    >>> ChannelAxis(dim=1, groups=4).channels(torch.zeros(4, 16, 8))  # four experts of (out, in)
    64

    Args:
        dim: The dimension of the weight that counts output channels.
        groups: Number of groups along dimension 0, each with its own output channels: as many as there are experts in a
            weight ``(experts, out, in)``, or those of a grouped transposed convolution with weights
            ``(in, out / groups, *kernel)``. It is 1 for every other layer.
    """

    dim: int = 0
    groups: int = 1

    def fits(self, weight: Tensor) -> bool:
        """Returns whether a weight can have its output channels there."""
        in_groups = self.groups == 1 or (self.dim > 0 and weight.shape[0] % self.groups == 0)
        return self.dim < weight.dim() > 1 and in_groups

    def channels(self, weight: Tensor) -> int:
        """Returns the number of output channels of ``weight``."""
        return weight.shape[self.dim] * self.groups

    def split(self, weight: Tensor) -> Tensor:
        """Returns a view with a dimension for the groups, if any: ``(groups, in / groups, out / groups, *kernel)``."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def join(self, weight: Tensor) -> Tensor:
        """Undoes :meth:`split`."""
        return weight if self.groups == 1 else weight.flatten(0, 1)

    def expand(self, per_channel: Tensor, split_weight: Tensor) -> Tensor:
        """Returns a view of ``(channels,)`` values that broadcasts to a weight that :meth:`split` returned."""
        shape = [1] * split_weight.dim()
        if self.groups == 1:
            shape[self.dim] = -1
        else:
            shape[0], shape[self.dim + 1] = self.groups, -1
        return per_channel.view(shape)

    def arrange(self, x: Tensor, raw_depth: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments of q for a weight, its raw bit depths ``(channels,)`` and exponents ``(channels,)``."""
        split = self.split(x)
        return split, self.expand(bit_depth(raw_depth), split), self.expand(exponent, split)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the smallest and the largest weight of each channel, ``(channels,)`` each."""
        split = self.split(whole(weight.detach()))
        kept = {self.dim} if self.groups == 1 else {0, self.dim + 1}
        within = tuple(d for d in range(split.dim()) if d not in kept)
        if not within:
            return split.flatten(), split.flatten()
        return split.amin(within).flatten(), split.amax(within).flatten()
