"""The bit depths of a network's channels by their original numbers, of which removals leave gaps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters, weight_name_of
from lightning_selfcompress.removal.surgery import Shrunk


class ChannelBits:
    """Keeps which of a network's original channels are left, so that each is shown in the same place all through.

    Which channels a network has lost, no layer tells. Where nothing is known of a layer that has fewer channels than it
    was converted with (a training that starts from a network made smaller before, without the callback's state), the
    first of its numbers are taken for those that are left, and the gaps are at the end.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert
    >>> from lightning_selfcompress.monitoring.channel_bits import ChannelBits
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> plan = convert(net, initial_bits=4)
    >>> ChannelBits().of(net)
    {'0.weight': tensor([4., 4., 4.]), '2.weight': tensor([4.])}

    Args:
        state: What :meth:`state_dict` returned, to go on from there.
    """

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        self._left = dict(state or {})  # name of a weight -> the original numbers of its channels, ascending, int64

    def state_dict(self) -> dict[str, Tensor]:
        """The original numbers of the channels that are left, for the name of each weight that has lost some."""
        return dict(self._left)

    def removed(self, shrunk: Iterable[Shrunk]) -> None:
        """Takes note of a removal.

        Args:
            shrunk: The tensors that have become smaller, bit depths among them.
        """
        for record in shrunk:
            name = weight_name_of(record.name)
            if name is not None and 0 in record.kept:
                before = self._left.get(name)
                if before is None or len(before) != record.shape[0]:
                    before = torch.arange(record.shape[0])
                self._left[name] = before[record.kept[0].cpu()]

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the bit depths of every channel that a network was converted with.

        Args:
            model: The converted module.

        Returns:
            For the name of each quantized weight, ``(original channels,)`` in bits, float32, on the CPU; NaN where a
            channel was removed.
        """
        return {p.name: self._by_original_number(p) for p in quantized_parameters(model)}

    def _by_original_number(self, parameter: QuantizedParameter) -> Tensor:
        depths = bit_depth(parameter.raw_depth.detach()).float().cpu()
        left = self._left.get(parameter.name)
        if left is None or len(left) != len(depths):
            left = torch.arange(len(depths))
        bits = torch.full((parameter.spec.original_channels,), torch.nan)
        bits[left] = depths
        return bits
