"""What one step, or a few batches, say of activations: signs, numbers that are not finite, batches by name."""

import pytest
import torch
from torch import nn

from lightning_selfcompress import calibrate_activations
from lightning_selfcompress.activations.layers import activated_modules, exponents_of
from lightning_selfcompress.activations.places import find_points, layers_left


class ZeroBranch(nn.Module):
    """A residual block whose last normalization starts at zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return nn.functional.relu(self.norm(self.conv(x)) + x)


class Masked(nn.Module):
    """A network with a second argument."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, scale=1.0):
        return self.b(self.a(x).relu() * scale)


def images():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def rows():
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def exponents(net):
    return {path: exponents_of(module).tolist() for path, module in activated_modules(net)}


def test_a_branch_that_starts_at_zero_is_signed():
    """Zeros say nothing of the sign, and an unsigned quantizer would never let a branch become negative."""
    net = nn.Sequential(ZeroBranch(), nn.Conv2d(3, 2, 1))
    places = find_points(net, lambda: net(images()))
    assert {place: seen.point(place[1], 8)[0].signed for place, seen in places.items()} == {
        ("0", "input"): True,
        ("0.norm", "output"): True,
        ("0", "output"): False,
    }


def test_a_branch_that_starts_at_zero_may_become_negative():
    """Whatever its shift learns on either side of zero gets through the quantizer."""
    net = calibrate_activations(nn.Sequential(ZeroBranch(), nn.Conv2d(3, 2, 1)), [images()])
    shift = torch.tensor([-0.25, 0.0, 0.25])
    with torch.no_grad():
        net[0].norm.bias.copy_(shift)
    assert torch.equal(net[0].norm(images()), shift[:, None, None].expand(4, 3, 6, 6))


def test_infinite_activations_choose_no_step_size():
    """One infinite value leaves the step size to the others."""
    net = nn.Sequential(nn.Linear(4, 2))
    x = rows()
    expected = exponents(calibrate_activations(net, [x[1:]]))
    x[0] = float("inf")
    assert exponents(calibrate_activations(net, [x])) == expected


def test_activations_that_are_not_numbers():
    """Where nothing finite is seen, an error names the place, and nothing is quantized."""
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"finite activations, got none at the input of '0'"):
        calibrate_activations(net, [torch.full((8, 4), float("nan"))])
    assert exponents(net) == {}


def test_batches_by_name():
    """A dictionary gives arguments by their names, and the result is that of the same arguments in order."""
    net = Masked()
    expected = exponents(calibrate_activations(net, [(rows(), 2.0)]))
    assert exponents(calibrate_activations(net, [{"x": rows(), "scale": 2.0}])) == expected


def test_a_dictionary_as_the_argument():
    """A network that takes a dictionary itself is given it."""

    class OfDictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 2))

        def forward(self, batch):
            return self.net(batch["features"])

    assert list(exponents(calibrate_activations(OfDictionary(), [{"features": rows()}]))) == ["net.0"]


def test_a_layer_with_a_forward_of_its_own():
    """Its input stays in float, which is said."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    first = net[0]
    first.forward = lambda x: nn.functional.linear(x, first.weight)
    assert layers_left(net) == ["0"]
    with pytest.warns(UserWarning, match=r"stays in float, as they have a forward of their own: \['0'\]"):
        calibrate_activations(net, [rows()])
    assert list(exponents(net)) == ["1"]
