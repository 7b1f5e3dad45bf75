"""The bits that each of a network's channels takes, by original numbers, of which removals leave gaps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_selfcompress.packing.content import to_rows
from lightning_selfcompress.quantize.formula import bit_depth, codes
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters, weight_name_of
from lightning_selfcompress.removal.surgery import Shrunk
from lightning_selfcompress.size.rate import channel_rate
from lightning_selfcompress.tensors import whole


class ChannelBits:
    """Keeps which of a network's original channels are left, so that each is shown in the same place all through.

    What is shown of a channel are the bits that one of its weights takes in the file, not its learned bit depth, the
    most that a weight may take: codes become small long before a depth falls.

    Which channels a network has lost, no layer tells. Where nothing is known of a layer that has fewer channels than it
    was converted with (a training that starts from a network made smaller before, without the callback's state), the
    first of its numbers are taken for those that are left, and the gaps are at the end.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert
    >>> from lightning_selfcompress.monitoring.channel_bits import ChannelBits
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> _ = nn.init.constant_(net[2].weight, 0.5)
    >>> plan = convert(net, initial_bits=2)
    >>> ChannelBits().of(net)["2.weight"]  # codes of 1 or -1
    tensor([1.])

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
        """Returns the bits of every channel that a network was converted with.

        Args:
            model: The converted module.

        Returns:
            For the name of each quantized weight, ``(original channels,)`` in bits a weight, float32, on the CPU; NaN
            where a channel was removed.
        """
        return {p.name: self._by_original_number(p) for p in quantized_parameters(model)}

    @torch.no_grad()
    def _by_original_number(self, parameter: QuantizedParameter) -> Tensor:
        raw, exponents = (whole(t.detach())[:, None] for t in parameter.learned)
        rows = to_rows(whole(parameter.latent.detach()), parameter.spec.axis)
        found = channel_rate(codes(rows.to(raw.dtype), bit_depth(raw), exponents)).cpu()
        left = self._left.get(parameter.name)
        if left is None or len(left) != len(found):
            left = torch.arange(len(found))
        bits = torch.full((parameter.spec.original_channels,), torch.nan)
        bits[left] = found
        return bits


def depths(model: nn.Module) -> Tensor:
    """Returns the learned bit depths of all channels of a model, ``(channels,)``, in bits, float32, on the CPU."""
    raw = [whole(p.raw_depth.detach()).float().cpu() for p in quantized_parameters(model)]
    return bit_depth(torch.cat(raw)) if raw else torch.zeros(0)
