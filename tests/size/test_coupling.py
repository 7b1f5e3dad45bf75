"""Coupling: weights count while their inputs are alive, and channels pay for them."""

import copy
import pickle

import pytest
import torch
from killing import watched
from torch import nn
from torch.testing import assert_close
from zoo import ZOO

from lightning_selfcompress import BitsPerWeight, revert, size_report
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.formula import bit_depth
from lightning_selfcompress.quantize.layers import COUPLING
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.removal.surgery import Replacement, replace_tensors
from lightning_selfcompress.size.coupling import alive_factor, couple
from lightning_selfcompress.size.price import ModelSize


def chain():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    convert(net)
    return net, watched(net, torch.randn(8, 4))[0]


def test_alive_while_any_producer_is():
    """1 - prod(1 - min(b, 1)) over the producers of a channel; those that do not matter are left out."""
    b = torch.tensor([0.25, 0.5, 3.0, 0.0, 0.0])
    assert alive_factor(b, torch.tensor([0, 0, 1, 2, 3]), 3).tolist() == [1 - 0.75 * 0.5, 1.0, 0.0]


def test_q_by_hand():
    """Q = sum_i n_i b_i / N, n counting inputs as far as they are alive."""
    net, channels = chain()
    net[0].bit_depth.data = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    net[2].bit_depth.data = torch.tensor([1.0, 2.0, 3.0])
    assert ModelSize.of(net).bits_per_weight().item() == pytest.approx((4 * 15.5 + 6 * 6) / 42)
    couple(net, channels)
    expected = (4 * 15.5 + 4.5 * 6) / (24 + 18)
    assert ModelSize.of(net).bits_per_weight().item() == pytest.approx(expected)


def test_a_channel_pays_for_its_consumers_in_its_last_bit():
    """The gradient of a depth below one bit has its consumers' weights in it; above it has its own alone."""
    net, channels = chain()
    net[0].bit_depth.data = torch.tensor([0.5, 0.5, 2.0, 2.0, 4.0, 8.0])
    net[2].bit_depth.data = torch.tensor([1.0, 2.0, 3.0])
    couple(net, channels)
    first, second = ModelSize.of(net).gradients(42.0)
    assert first.tolist() == pytest.approx([4 + 6, 4 + 6, 4, 4, 4, 4])
    assert second.tolist() == pytest.approx([5.0, 5.0, 5.0])


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet", "grouped_transposed", "bilinear", "char_transformer"])
def test_gradients_against_finite_differences(name):
    """The gradient is that of Q, on streams, groups, several inputs and tied weights."""
    net = ZOO[name].make().double()
    convert(net)
    inputs = [t.double() if t.is_floating_point() else t for t in ZOO[name].inputs()]
    channels, _ = watched(net, *inputs)
    for p in quantized_parameters(net):
        p.raw_depth.data.uniform_(0.2, 1.6)
    couple(net, channels)
    size = ModelSize.of(net)
    gradients = size.gradients(1.0)
    for p, gradient in zip(size.parameters, gradients, strict=True):
        for i in range(0, p.channels, 5):
            kept, values = p.raw_depth.data[i].item(), []
            for delta in (1e-6, -1e-6):
                p.raw_depth.data[i] = kept + delta
                values.append(size.bits_per_weight().item())
            p.raw_depth.data[i] = kept
            if abs(kept - 1) > 1e-5:
                assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet", "grouped_transposed", "bilinear", "char_transformer"])
@pytest.mark.parametrize("least", [-0.5, 1.5])
def test_gradients_are_those_of_autograd(name, least):
    """The closed form is what autograd derives from Q, to the last digits, also at no bits and at one."""
    net = ZOO[name].make().double()
    convert(net)
    inputs = [t.double() if t.is_floating_point() else t for t in ZOO[name].inputs()]
    channels, _ = watched(net, *inputs)
    for p in quantized_parameters(net):
        p.raw_depth.data.uniform_(least, 2.5)
        p.raw_depth.data[::7] = max(least, 1.0)
    couple(net, channels)
    size = ModelSize.of(net)
    expected = torch.autograd.grad(3.0 * size.bits_per_weight(), [p.raw_depth for p in size.parameters])
    assert_close(size.gradients(3.0), expected, rtol=1e-12, atol=1e-12 / size.original_numel)


def test_parts_add_up_and_see_the_whole():
    """The parts of Q for several optimizers add up to it, and their gradients are those of the whole."""
    net, channels = chain()
    net[0].bit_depth.data.fill_(0.5)
    couple(net, channels)
    size = ModelSize.of(net)
    parts = [size.part([p]) for p in size.parameters]
    assert sum(p.bits_per_weight().item() for p in parts) == pytest.approx(size.bits_per_weight().item())
    for part, whole in zip(parts, size.gradients(1.0), strict=True):
        assert torch.equal(part.gradients(1.0)[0], whole)


def test_notes_go_with_the_layers():
    """Q is the same for a deep copy, a pickle, a module inside and the network around it."""
    net, channels = chain()
    net[0].bit_depth.data = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    couple(net, channels)
    expected = ModelSize.of(net).bits_per_weight().item()
    assert expected < (4 * 15.5 + 6 * 3 * 8) / 42
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), nn.Sequential(nn.ReLU(), net)):
        assert ModelSize.of(other).bits_per_weight().item() == expected


def test_inputs_made_elsewhere_count_as_alive():
    """The size of a part of a network counts the inputs that come from outside."""
    net, channels = chain()
    net[0].bit_depth.data = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    couple(net, channels)
    assert ModelSize.of(net[2]).bits_per_weight().item() == 8.0


def test_notes_go_when_shapes_change():
    """A layer that has other shapes counts all inputs until its channels are noted again; revert leaves no note."""
    net, channels = chain()
    net[0].bit_depth.data.fill_(0.5)
    couple(net, channels)
    replace_tensors(net[2], {id(net[2].latent("weight")): Replacement(torch.zeros(3, 6))})
    assert COUPLING not in net[2].__dict__
    assert ModelSize.of(net).bits_per_weight().item() == pytest.approx((24 * 0.5 + 18 * 8) / 42)
    revert(net)
    assert all(COUPLING not in layer.__dict__ for layer in net)


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet", "grouped_transposed", "bilinear", "char_transformer"])
def test_reported_q_is_the_minimized_one(name):
    """The report's total, the metric and the shares of its layers are the Q whose gradient training takes."""
    net = ZOO[name].make()
    convert(net)
    couple(net, watched(net, *ZOO[name].inputs())[0])
    for p in quantized_parameters(net):
        p.raw_depth.data.uniform_(-0.3, 1.6)
    minimized = ModelSize.of(net).bits_per_weight().item()
    report = size_report(net)
    assert report.bits_per_weight == pytest.approx(minimized, rel=1e-5)
    assert sum(layer.learned_bits for layer in report.layers) / report.total.weights_before == pytest.approx(minimized)
    assert BitsPerWeight(net).compute().item() == pytest.approx(minimized, rel=1e-5)
    own = sum(float(bit_depth(p.raw_depth).sum()) * p.weights_per_channel for p in quantized_parameters(net))
    assert minimized < 0.999 * own / report.total.weights_before
