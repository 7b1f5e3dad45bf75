"""The price in operations: uses are counted, and a weight costs as often as it is used."""

import pytest
import torch
from layer_kinds import KINDS
from networks import Lit, batches, make_trainer
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress import ChannelAxis, SelfCompression, convert, revert, size_report
from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.operations import counting_uses, model_operations, note_uses, uses_of
from lightning_selfcompress.size.price import ModelSize


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


def test_counts_positions():
    """A convolution uses a weight once for each position and image, a linear layer once for each image."""
    net = lenet()
    convert(net)
    with counting_uses(net) as uses:
        net(torch.randn(3, 1, 28, 28))
    assert uses == {"0.weight": 3 * 24 * 24, "3.weight": 3 * 8 * 8, "5.weight": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_counted(kind):
    """Layers of every kind that multiply have uses; a table that is only read has at most one for each row read."""
    layer = KINDS[kind].make()
    convert(layer)
    with counting_uses(layer) as uses:
        layer(*KINDS[kind].inputs())
    assert len(uses) == len(list(quantized_parameters(layer)))
    assert all(u > 0 for u in uses.values())


class Within(nn.Module):
    """A weight of its own beside a layer, in a module that is run, and one in a list that is not."""

    def __init__(self):
        super().__init__()
        self.inner, self.own = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 5))
        self.listed = nn.ParameterList([torch.randn(5, 3)])

    def forward(self, x):
        return self.inner(x) @ self.own @ self.listed[0]


def test_layers_inside_a_layer_are_counted_once():
    """What a layer inside multiplies is not the outer layer's; a list that is never run shares those of its owner."""
    net = Within()
    convert(net, axes={"own": ChannelAxis(1), "listed.0": ChannelAxis(1)})
    with counting_uses(net) as uses:
        net(torch.randn(2, 4))
    assert uses == {"own": 2.0, "inner.weight": 2.0, "listed.0": 2.0}


def test_weights_that_no_forward_uses_are_not_known():
    """A weight that a step uses past the ``forward`` of its module has no number of uses."""
    net = Within()
    convert(net, axes={"own": ChannelAxis(1), "listed.0": ChannelAxis(1)})
    with counting_uses(net) as uses:
        net.inner(torch.randn(2, 4)) @ net.own @ net.listed[0]
    assert uses == {"inner.weight": 2.0}


def test_price_is_bits_by_multiplication():
    """Each layer's bits count as often as they are used, and the gradient of each depth does too."""
    net = lenet()
    convert(net, initial_bits=6)
    with torch.no_grad():
        net[3].bit_depth.fill_(2.0)
    with counting_uses(net) as uses:
        net(torch.randn(2, 1, 28, 28))
    note_uses(net, uses, 2)
    macs = [150 * 576, 1200 * 64, 5120]
    price = model_operations(net)
    assert price.bits_per_weight().item() == pytest.approx((6 * macs[0] + 2 * macs[1] + 6 * macs[2]) / sum(macs))
    raw = [p.raw_depth for p in price.parameters]
    assert_close(price.gradients(3.0), torch.autograd.grad(3.0 * price.bits_per_weight(), raw), rtol=1e-5, atol=0)
    report = size_report(net)
    assert [layer.macs_before for layer in report.layers] == macs
    assert f"multiply-accumulates: {sum(macs):,} of {sum(macs):,}, 100.0%" in str(report)


def test_without_uses_it_is_q():
    """Before anything was counted the price is the paper's Q, and the report says nothing of operations."""
    net = lenet()
    convert(net)
    assert model_operations(net).bits_per_weight().item() == ModelSize.of(net).bits_per_weight().item()
    assert "multiply" not in str(size_report(net))
    assert model_operations(nn.ReLU()).bits_per_weight() == 0


def test_notes_leave_with_the_conversion():
    """Reverted layers hold no note."""
    net = lenet()
    convert(net)
    note_uses(net, {"0.weight": 5.0}, 1)
    assert [uses_of(p) for p in quantized_parameters(net)] == [5.0, None, None]
    revert(net)
    assert all("_uses" not in layer.__dict__ for layer in net)


def test_in_a_training(tmp_path):
    """Under price="operations" the uses are counted before the first step, those of one image."""
    torch.manual_seed(0)
    model = Lit()
    compression = SelfCompression(gamma=1e-4, price="operations", bits_lr=1e-3, prune_every_n_epochs=0)
    make_trainer(compression).fit(model, batches(4))
    uses = {p.name: uses_of(p) for p in quantized_parameters(model)}
    assert uses == {"net.0.weight": 36.0, "net.4.weight": 1.0, "net.6.weight": 1.0}
    price = model_operations(model)
    total = 54 * 36 + 3456 + 64
    by_hand = sum(
        float(bit_depth(p.raw_depth.detach()).sum()) * p.weights_per_channel * uses[p.name] for p in price.parameters
    )
    assert price.bits_per_weight().item() == pytest.approx(by_hand / total, rel=1e-5)
