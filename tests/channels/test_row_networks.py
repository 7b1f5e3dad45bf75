"""Networks that pick and scatter rows lose the channels of their features, whatever they do with the rows."""

import pytest
import torch
from killing import assert_exact, converted, watched
from row_networks import NETWORKS

KEPT = {  # layers of which all channels stay, beside the head
    "decoder": ("first", "o", "down"),  # normalized as a whole
    "decoder, dropout": ("first", "o", "down"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_go(name):
    """Every hidden channel of a linear layer or convolution may go, and half of them go exactly."""
    make, x = NETWORKS[name]
    net = converted(make())
    channels, watcher = watched(net, x)
    assert watcher.failures == []
    assert channels.unseen == ()
    removable = channels.removable()
    stay = {
        slot.name.removesuffix(".bit_depth")
        for slot in channels.slots
        if slot.produces and not removable[channels.group[slot.atoms]].all()
    }
    assert stay == {"head", *KEPT.get(name, ())}
    assert_exact(net, channels, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_are_those_of_evaluation(name, mode):
    """Without gradients other operations arrive, and the channels are the same."""
    make, x = NETWORKS[name]
    net = converted(make())
    trained, _ = watched(net, x)

    def step():
        net.eval()
        with getattr(torch, mode)():
            net(x)

    evaluated, watcher = watched(net, step=step)
    assert watcher.failures == []
    assert (trained.group == evaluated.group).all()
    assert (trained.removable() == evaluated.removable()).all()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "decoder, dropout"])
def test_channels_are_those_under_autocast(name):
    """Under autocast the channels are the same."""
    make, x = NETWORKS[name]
    net = converted(make())
    plain, _ = watched(net, x)
    net.float()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            net(x.float())

    cast, watcher = watched(net, step=step)
    assert watcher.failures == []
    assert (plain.removable() == cast.removable()).all()
