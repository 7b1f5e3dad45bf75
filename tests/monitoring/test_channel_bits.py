"""The bits of every original channel, while channels leave."""

import torch
from fits import SCHEDULE, Kill, data, fit, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from networks import Lit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.monitoring.channel_bits import ChannelBits, depths
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.removal.surgery import Edit, remove

TAG = "selfcompress/channel_bits"
GONE = (
    {"net.0.weight": [1, 4], "net.4.weight": [0, 7, 15], "net.6.weight": []},
    {"net.0.weight": [0, 1, 4], "net.4.weight": [0, 3, 7, 15], "net.6.weight": []},
)


def gaps(bits):
    """The numbers of the channels that were removed."""
    return {name: values.isnan().nonzero().flatten().tolist() for name, values in bits.items()}


def without(net, *numbers, size):
    """Removes output channels of a linear layer."""
    return remove(net, [Edit(name, 0, size, numbers) for name in ("0.weight", "0.bias", "0.bit_depth", "0.exponent")])


def small():
    """Six channels of two weights: of no bits, of codes 0, of 0 and 1, of 1 and 1, of 1 and 3, of 2 and 2."""
    net = nn.Sequential(nn.Linear(2, 6))
    convert(net)
    with torch.no_grad():
        net[0].exponent.zero_()
        net[0].bit_depth[0] = -1
        net[0].latent("weight").copy_(torch.tensor([[4, 4], [0, 0], [0, 1], [1, -1], [1, 3], [-2, 2.0]]))
    return net


def test_removed_channels_are_gaps():
    """After two removals each channel is in its first place, in bits of a weight's codes, the removed ones NaN."""
    net, bits = small(), ChannelBits()
    assert bits.of(net)["0.weight"].tolist() == [0, 0, 1.5, 1, 3, 3]  # entropies of geometric codes, zeros apart
    bits.removed(without(net, 1, 4, size=6))
    bits.removed(without(net, 1, size=4))
    left = bits.of(net)["0.weight"]
    assert left.dtype == torch.float32
    torch.testing.assert_close(left, torch.tensor([0, torch.nan, torch.nan, 1, torch.nan, 3]), equal_nan=True)
    assert bits.state_dict()["0.weight"].tolist() == [0, 3, 5]
    assert depths(net).tolist() == [0, 8, 8]


def test_state_goes_on():
    """What was restored from a state goes on as if it had never stopped."""
    net, bits = small(), ChannelBits()
    bits.removed(without(net, 0, size=6))
    bits = ChannelBits(bits.state_dict())
    bits.removed(without(net, 0, size=5))
    assert gaps(bits.of(net)) == {"0.weight": [0, 1]}


def test_unknown_numbers_are_the_first():
    """Of a network that became smaller before, or is another than the one that is known, the last places are gaps."""
    net, bits = small(), ChannelBits()
    shrunk = without(net, 0, 2, size=6)
    assert gaps(bits.of(net)) == {"0.weight": [4, 5]}
    bits.removed(shrunk)
    assert gaps(bits.of(small())) == {"0.weight": []}
    bits.removed(without(small(), 5, size=6))
    assert gaps(bits.of(net)) == {"0.weight": [4, 5]}


def test_a_fit_knows_what_it_removed(tmp_path):
    """TensorBoard gets the bits of each epoch; a fit that goes on from a checkpoint knows what went before."""
    logger = TensorBoardLogger(tmp_path)
    model, trainer = fit(1, logger=logger, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    bits = trainer.callbacks[0]._monitor.channel_bits.of(model)
    assert gaps(bits) == GONE[0]
    events = EventAccumulator(logger.log_dir, {"tensors": 0}).Reload()
    for name, values in bits.items():
        (logged,) = (torch.from_numpy(make_ndarray(e.tensor_proto)) for e in events.Tensors(f"{TAG}/{name}"))
        torch.testing.assert_close(logged, values, rtol=0, atol=0, equal_nan=True)

    torch.manual_seed(1)
    resumed, again = Lit(), SelfCompression(gamma=0.01)
    trainer = make_trainer(again, Kill(SCHEDULE), precision="64-true", max_epochs=2)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "first.ckpt")
    assert gaps(again._monitor.channel_bits.of(resumed)) == GONE[1]
