"""Running statistics estimated anew: the plain average over batches, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_selfcompress import convert, recalibrate
from lightning_selfcompress.running_statistics import reestimating, with_statistics

DATA = [torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 5), nn.BatchNorm1d(5))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_is_the_average_over_batches(converted, training):
    """The statistics are those of torch's ``update_bn`` on the network without dropout; all else is as before."""
    net = network()
    if converted:
        convert(net)
    net.train(training)
    other = copy.deepcopy(net)
    other[3].p = 0.0
    update_bn(DATA, other)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert recalibrate(net, DATA) == 4
    for name, t in net.state_dict().items():
        expected = other.state_dict()[name] if "running" in name else before[name]
        assert torch.allclose(t, expected, rtol=1e-6, atol=0), name
    assert all(m.training is training for m in net.modules())
    assert [m.momentum for m in with_statistics(net).values()] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("loader", "forward"),
    [
        ([(x, "label") for x in DATA], None),
        ([[x] for x in DATA], None),
        ([{"x": x} for x in DATA], lambda net, batch: net(batch["x"])),
    ],
    ids=["tuples", "lists", "mappings"],
)
def test_batches(loader, forward):
    """Batches may be tuples and lists, whose first entry counts, or anything that ``forward`` can take."""
    one, two = network(), network()
    recalibrate(one, loader, forward=forward)
    recalibrate(two, DATA)
    assert torch.equal(one[1].running_mean, two[1].running_mean)
    assert torch.equal(one[6].running_var, two[6].running_var)


def test_what_cannot_be_run():
    """Batches that nobody can run, none at all, and errors leave the statistics as they were."""
    net = network()
    before = net[1].running_mean.clone()
    with pytest.raises(TypeError, match="forward=lambda model, batch"):
        recalibrate(net, [{"x": DATA[0]}])
    with pytest.raises(ValueError, match="a loader with batches"):
        recalibrate(net, [])
    with pytest.raises(RuntimeError):
        recalibrate(net, [DATA[0], torch.randn(2, 1)])
    assert torch.equal(net[1].running_mean, before)
    assert recalibrate(nn.Linear(2, 2), []) == 0


def test_layers_that_are_not_wanted_or_not_run():
    """A layer that is not named normalizes as in evaluation, and one that is not run keeps its statistics."""
    net = network()
    net.aside = nn.BatchNorm1d(3)
    nn.init.constant_(net.aside.running_mean, 2.0)
    kept = net[6].running_var.clone()
    with torch.no_grad(), reestimating(net, ["1", "aside"]):
        assert not net[6].training
        net[:7](DATA[0])
    assert torch.equal(net[6].running_var, kept)
    assert net.aside.running_mean.tolist() == [2.0] * 3
    assert not torch.equal(net[1].running_mean, torch.zeros(4))
