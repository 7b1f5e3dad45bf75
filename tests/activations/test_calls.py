"""Modules that run several times in a step: one place wherever one step size fits all calls."""

import torch
from networks import Gan
from torch import nn

from lightning_selfcompress.activations.places import find_points


class Net(nn.Module):
    """A residual network of images with one ReLU module for all of its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.a(x))
        return self.head(self.relu(self.norm(self.b(x)) + x).mean((2, 3)))


class TwoViews(nn.Module):
    """A network that runs twice in a step, as in contrastive training."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def step(self, x):
        return (self.net(x) - self.net(x.flip(-1))).square().mean()


def images(n=4):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_network_that_runs_twice_has_the_places_of_one_that_runs_once():
    """Two views of a batch go through the same quantizers as one."""
    torch.manual_seed(0)
    model = TwoViews()
    once = find_points(model.net, lambda: model.net(images()))
    twice = find_points(model, lambda: model.step(images()))
    assert {(f"net.{path}", where) for path, where in once} == set(twice)
    assert ("norm", "output") in once


def test_a_module_that_runs_twice_in_its_network_is_no_place():
    """Each reader of a ReLU module that stands for two has a step size of its own."""
    model = Net()
    assert ("relu", "output") not in find_points(model, lambda: model(images()))


def test_a_layer_that_also_reads_what_no_module_makes_is_quantized_at_its_input():
    """A discriminator reads images and what a generator made, which are quantized once, where it reads them."""
    model = Gan()

    def step():
        noise = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        model.discriminator_loss(images().flatten(1)[:, :64].repeat(2, 1), noise)
        model.discriminator(model.generator(noise))

    assert set(find_points(model, step)) == {
        ("generator.0", "input"),
        ("generator.1", "output"),
        ("discriminator.0", "input"),
        ("discriminator.1", "output"),
    }


def test_a_mean_that_a_loss_takes_is_no_place():
    """A critic's map of scores is an output, whose mean is the loss; a mean within the network is a place."""
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))
    assert set(find_points(critic, lambda: -critic(images()).mean())) == {("0", "input"), ("1", "output")}
    pooled = nn.Sequential(*critic, nn.AdaptiveAvgPool2d(1))
    assert ("2", "output") in find_points(pooled, lambda: pooled(images()))


def test_a_call_that_fails_ends():
    """A call that raises, and is caught by the step, leaves nothing of itself: a later mean is still a loss's."""
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))

    def step():
        try:
            critic(torch.randn(1, 5))
        except RuntimeError:
            return critic(images()).mean()

    assert ("2", "output") not in find_points(critic, step)
