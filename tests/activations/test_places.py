"""Where activations are quantized: at what layers read, once for all who read it, with the right sign."""

import pytest
import torch
from torch import nn

from lightning_selfcompress import convert
from lightning_selfcompress.activations.layers import OUTPUT
from lightning_selfcompress.activations.places import can_be_activated, find_points


class Block(nn.Module):
    """Two convolutions around a skip; ``call`` computes the two ReLUs."""

    def __init__(self, call=None):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.call = nn.ReLU(inplace=True), call

    def forward(self, x):
        relu = self.call or self.relu
        return relu(self.norm_b(self.b(relu(self.norm_a(self.a(x))))) + x)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.c(torch.cat((self.a(x), self.b(x).relu()), 1))


def found(net, *inputs):
    """The places of a network: (path, where) -> whether codes are signed."""
    places = find_points(net.eval(), lambda: net(*inputs))
    return {place: seen.point(place[1], 8)[0].signed for place, seen in places.items()}


def images(channels=4, n=2):
    return torch.randn(n, channels, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("call", [None, nn.functional.relu], ids=["one module called twice", "a function"])
def test_a_residual_block(call):
    """Both operands of the sum are quantized, and the block's output where the block returns it."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), Block(call), nn.Conv2d(4, 2, 1))
    assert found(net, images()) == {
        ("0", "input"): True,
        ("0", "output"): True,
        ("1.b", "input"): False,
        ("1.norm_b", "output"): True,
        ("1", "output"): False,
    }


def test_a_convolution_before_its_normalization_is_no_place():
    """Batch normalization is folded into the convolution, so what lies between is not quantized."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert found(net, images()) == {("0", "input"): True, ("2", "output"): False}


def test_the_outputs_stay_in_float():
    """No place is the output of the network itself."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert found(net, torch.randn(9, 4)) == {("0", "input"): True, ("1", "output"): False}


def test_operands_of_a_concatenation():
    """What is joined is quantized where it is made or, where no module returns it, with what is read."""
    assert found(Joined(), images(2)) == {
        ("a", "input"): True,
        ("a", "output"): True,
        ("b", "input"): True,
        ("c", "input"): True,
    }


def test_whole_numbers_are_left_alone():
    """Indices are not quantized, what is looked up by them is."""
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    assert list(found(net, torch.tensor([[0, 3, 4]]))) == [("0", "output")]


def test_only_quantized_layers_count_in_a_converted_network():
    """The input of a layer that was left in float stays in float."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    convert(net, skip=["2"])
    assert list(found(net, torch.randn(9, 4))) == [("0", "input")]


NEVER_NEGATIVE = nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Hardtanh(0.0, 1.0), nn.Softmax(-1), nn.Softplus()
MAY_BE_NEGATIVE = nn.GELU(), nn.Tanh(), nn.Hardtanh(), nn.LeakyReLU()


@pytest.mark.parametrize("activation", NEVER_NEGATIVE + MAY_BE_NEGATIVE, ids=str)
def test_the_sign_is_the_operations(activation):
    """Of few examples that happen to be positive, what an operation may make decides whether codes are signed."""
    net = nn.Sequential(nn.Linear(2, 2), activation, nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
    assert found(net, torch.tensor([[0.25, 0.75]]))["1", OUTPUT] is (activation in MAY_BE_NEGATIVE)


def test_moves_keep_the_sign():
    """Behind pooling, dropout and flattening what a ReLU made is still not negative."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2))
    assert found(net, images(n=1))["4", OUTPUT] is False


def test_inputs_are_signed_until_many_were_seen():
    """Three positive inputs say nothing of the next ones; an image of positive pixels does."""
    assert found(nn.Sequential(nn.Linear(3, 2)), torch.rand(1, 3)) == {("0", "input"): True}
    assert found(nn.Sequential(nn.Conv2d(4, 2, 3)), torch.rand(2, 4, 6, 6)) == {("0", "input"): False}


def test_a_sum_written_over_a_positive_tensor_is_signed():
    """What is done in place ends what was known of the tensor before it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x).relu()
            y += torch.ones(2)
            return self.b(y)

    assert found(Net(), torch.rand(1, 2))["b", "input"] is True


def test_nothing_is_left_on_the_network():
    """Looking for places leaves no hook behind."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found(net, torch.randn(9, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_what_cannot_be_activated():
    """Lists of modules, scripted modules and modules with a forward of their own stay what they are."""
    own = nn.ReLU()
    own.forward = torch.relu
    assert [can_be_activated(m) for m in (nn.ReLU(), nn.ModuleList(), torch.jit.script(nn.ReLU()), own)] == [
        True,
        False,
        False,
        False,
    ]
