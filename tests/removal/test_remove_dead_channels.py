"""Removal in one call, in a training loop without Lightning."""

import copy

import pytest
import torch
from torch import nn

from lightning_selfcompress import convert, remove_dead_channels, revert, size_report
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.size.price import ModelSize


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    )
    convert(model)
    return model


def loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


BATCH = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


@pytest.mark.parametrize("closed", [False, True])
def test_training_goes_on_as_before(closed):
    """Dead channels leave the network and its optimizer between two steps, and no loss changes."""
    losses = {}
    for removed in (False, True):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses[removed] = []
        for step in range(8):
            optimizer.zero_grad()
            value = loss(model, *BATCH)
            value.backward()
            optimizer.step()
            losses[removed].append(value.item())
            del value
            if step == 3:
                model[0].bit_depth.data[[1, 5]] = 0
                model[2].bit_depth.data[3] = 0
                for layer in (model[0], model[2]):
                    layer.forget_quantized()
            if step == 3 and removed:
                call = {} if closed else {"inputs": BATCH}
                run = (lambda m: loss(m, *BATCH)) if closed else loss
                plan = remove_dead_channels(model, run, [optimizer], **call)
                assert len(plan.channels) == 3
                assert str(plan).startswith("Removed: 3 channels")
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [6, 7, 3]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_nothing_dead_is_nothing_removed():
    """Where all channels are alive the plan is empty and the model untouched."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = remove_dead_channels(model, loss, inputs=BATCH)
    assert not plan
    assert str(plan) == "Nothing to remove"
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_says_why_dead_channels_stay():
    """What stays is in the plan, with its reason."""
    model = net()
    model[4].bit_depth.data[1] = 0
    plan = remove_dead_channels(model, lambda m, x, y: m(x), inputs=BATCH)
    assert plan.refused == {("4", "it is an output of the network"): 1}
    assert plan.refusals == ("1 dead in 4 stay: it is an output of the network",)


def test_q_pays_for_consumers_afterwards():
    """The channels that were found are noted: Q counts weights as far as their inputs are alive."""
    model = net()
    remove_dead_channels(model, loss, inputs=BATCH)
    model[0].bit_depth.data[:4] = 0.5
    weights = 48 + 64 + 24
    expected = (6 * (4 * 0.5 + 4 * 8) + (8 - 4 * 0.5) * 8 * 8 + 8 * 3 * 8) / weights
    assert ModelSize.of(model).bits_per_weight().item() == pytest.approx(expected)
    assert size_report(model).bits_per_weight == pytest.approx(expected)


def test_a_float_network_is_refused():
    """There is nothing to remove where nothing was converted, and the error says what to call."""
    with pytest.raises(ValueError, match=r"Expected a converted Sequential.*Call convert\(model\) first"):
        remove_dead_channels(nn.Sequential(nn.Linear(2, 2)), lambda m: m(torch.ones(1, 2)))


def test_depths_are_no_parameters():
    """A loop that optimizes parameters() trains weights alone; what is learned is listed apart, and reverts."""
    model = net()
    assert {id(p) for p in model.parameters()}.isdisjoint(learned_tensors(model))
    assert len(learned_tensors(model)) == 6
    kept = list(model.parameters())
    revert(model)
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    assert list(model.buffers()) == []
