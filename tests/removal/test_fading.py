"""Fading: constants of dead channels go to zero in a straight line."""

import numpy as np
import pytest
import torch
from killing import watched
from torch import nn

from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.removal.fading import Fading
from lightning_selfcompress.removal.plan import constant_channels, plan_removal
from lightning_selfcompress.removal.surgery import remove


def net():
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.constant_(made[0].bias, 1.0)
    nn.init.constant_(made[1].bias, 2.0)
    convert(made)
    return made, watched(made, torch.randn(8, 4))[0]


def test_goes_to_zero_in_a_straight_line_and_stays():
    """Bias, scale and shift of a dead channel lose an equal part at each step, the others nothing."""
    model, channels = net()
    model[0].bit_depth.data[2] = -1
    fading = Fading(model, channels, steps=4)
    seen = []
    for _ in range(6):
        fading.step()
        seen.append((model[0].bias[2].item(), model[1].weight[2].item(), model[1].bias[2].item()))
    for (bias, scale, shift), left in zip(seen, (0.75, 0.5, 0.25, 0, 0, 0), strict=True):
        assert (bias, scale, shift) == pytest.approx((left, left, 2 * left))
    assert seen[-1] == (0, 0, 0)
    assert (model[0].bias[[0, 1, 3, 4, 5]] == 1).all()


def test_is_held_at_zero_against_the_optimizer():
    """Whatever moves a constant afterwards, it is zero again after the step."""
    model, channels = net()
    model[0].bit_depth.data[2] = -1
    fading = Fading(model, channels, steps=1)
    fading.step()
    model[0].bias.data.add_(0.1)
    fading.step()
    assert model[0].bias[2] == 0


def test_a_channel_goes_only_when_faded():
    """Until its constants are zero a dead channel is not planned for, and the plan says why."""
    model, channels = net()
    model[0].bit_depth.data[2] = -1
    assert not plan_removal(model, channels)
    assert "fading" in str(plan_removal(model, channels))
    fading = Fading(model, channels, steps=2)
    fading.step()
    fading.step()
    number = channels.of("0.bit_depth", 0)[2]
    assert plan_removal(model, channels).channels == (number,)
    assert not constant_channels(model, channels)[number]


def test_outputs_are_not_faded():
    """A dead channel that has to stay keeps its bias."""
    model, channels = net()
    model[3].bit_depth.data.fill_(-1)
    before = model[3].bias.clone()
    Fading(model, channels, steps=1).step()
    assert torch.equal(model[3].bias, before)


def test_the_last_channel_of_a_layer_fades_too():
    """A layer down to one channel keeps it, and emits nothing once that has died."""
    model, channels = net()
    model[0].bit_depth.data[1:] = -1
    fading = Fading(model, channels, steps=1)
    fading.step()
    plan = plan_removal(model, channels)
    remove(model, plan.edits)
    gone = np.zeros(channels.count, bool)
    gone[list(plan.channels)] = True
    channels = channels.without(gone)
    model[0].bit_depth.data.fill_(-1)
    Fading(model, channels, steps=1, left=fading.left).step()
    assert model[0].bias.shape == model[1].weight.shape == (1,)
    assert not model[0].bias.any()
    assert not model[1].weight.any()
    assert not model[1].bias.any()
    assert "the last of its layer" in str(plan_removal(model, channels))


def test_steps_are_checked():
    """At least one step."""
    model, channels = net()
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        Fading(model, channels, steps=0)
