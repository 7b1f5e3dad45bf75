"""The dry run: what no operation shows is found on a copy."""

import copy
import random

import numpy as np
import pytest
import torch
from killing import difference, kill, randomize, watched
from torch import nn
from zoo import ZOO

from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import learned_tensors
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.removal.trial import Replay


class Written(nn.Module):
    """A size written into the code of the second layer's output; the first layer is free."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.dropout(self.two(self.one(x).relu()))
        return self.three(hidden.view(-1, 12).relu())


def half_dead(net, *inputs):
    convert(net)
    channels, _ = watched(net, *inputs)
    randomize(net)
    kill(net, channels, channels.removable() & (np.random.default_rng(0).random(channels.count) < 0.5))
    return channels, plan_removal(net, channels)


def replay(*inputs):
    return lambda net, dtype: net(*(t.to(dtype) if t.is_floating_point() else t for t in inputs))


@pytest.mark.parametrize("name", ["vit", "masked_transformer"])
def test_refuses_what_changes_the_outputs(name):
    """A transformer's hidden widths go; its attention, whose width is a number in torch's code, stays."""
    net, inputs = ZOO[name].make(), ZOO[name].inputs()
    channels, plan = half_dead(net, *inputs)
    proved, after = prove(net, channels, plan, [Replay(replay(*inputs))])
    assert 0 < len(proved.channels) < len(plan.channels)
    assert all("self_attn" in layer for layer, _ in proved.refused)
    assert not any("self_attn" in layer for layer in proved.widths)
    assert len(after.pinned) > len(channels.pinned)
    smaller = copy.deepcopy(net)
    remove(smaller, proved.edits)
    double = [copy.deepcopy(n).double() for n in (net, smaller)]
    assert difference(*double, *(t.double() if t.is_floating_point() else t for t in inputs)) < 1e-10


def test_pins_layers_of_a_written_size_and_keeps_the_rest():
    """The layer in front of a written size stays, all of it and for good; the others go."""
    net, x = Written(), torch.randn(4, 5)
    channels, plan = half_dead(net, x)
    assert {"one", "two"} <= plan.widths.keys()
    proved, after = prove(net, channels, plan, [Replay(replay(x))])
    assert proved.widths.keys() == {"one"}
    assert "dry run" in str(proved)
    assert not after.removable()[after.of("two.bit_depth", 0)].any()
    assert after.removable()[after.of("one.bit_depth", 0)].all()


def test_leaves_model_and_random_states_alone():
    """Parameters, buffers, gradients, modes and the generators of torch, NumPy and Python are as before."""
    net = ZOO["vgg_bn"].make()
    inputs = ZOO["vgg_bn"].inputs()
    channels, plan = half_dead(net, *inputs)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert prove(net, channels, plan, [Replay(replay(*inputs))])[0].channels == plan.channels
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in before.items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (np.random.get_state()[1].tolist(), random.getstate())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_removes_nothing_where_the_step_cannot_be_repeated():
    """A network that fails on a copy keeps its channels, and the reason is told."""
    net, x = Written(), torch.randn(4, 5)
    channels, plan = half_dead(net, x)

    def fails(net, dtype):
        raise KeyError("no such batch")

    proved, after = prove(net, channels, plan, [Replay(fails)])
    assert not proved
    assert "KeyError" in str(proved)
    assert after is channels


def test_runs_networks_that_name_their_dtype():
    """Where float64 does not run, float32 does."""
    net = ZOO["mlp"].make()
    inputs = ZOO["mlp"].inputs()
    channels, plan = half_dead(net, *inputs)

    def single(net, dtype):
        if dtype != torch.float32:
            raise RuntimeError("expected Float")
        return net(*inputs)

    assert prove(net, channels, plan, [Replay(single)])[0].channels == plan.channels


def test_a_wrong_removal_is_seen():
    """Channels that are not dead are refused, although every operation allows their removal."""
    net, inputs = ZOO["vgg_bn"].make(), ZOO["vgg_bn"].inputs()
    channels, plan = half_dead(net, *inputs)
    with torch.no_grad():
        for tensor in (*net.parameters(), *learned_tensors(net).values()):
            if tensor.dim() == 1:
                tensor.add_(0.5)  # depths, biases and shifts: nothing is dead any more
    assert not prove(net, channels, plan, [Replay(replay(*inputs))])[0]


class Summed(nn.Module):
    """A hidden layer whose consumer is called by hand, so that nothing but the loss shows what it computes."""

    def __init__(self, penalty):
        super().__init__()
        self.one, self.two, self.penalty = nn.Linear(5, 8), nn.Linear(8, 3), penalty

    def step(self, x):
        hidden = nn.functional.linear(x, self.one.weight, self.one.bias).relu()
        out = nn.functional.linear(hidden, self.two.weight, self.two.bias)
        return out.square().mean() + self.penalty(self)


def one_dead(net, x):
    """The channels of a network that is watched in a step, and a plan for one that is dead."""
    convert(net)
    watcher = Watcher(net)
    with watcher:
        watcher.pin_outputs(net.step(x), "it is the loss")
    channels = watcher.channels()
    net.one.bit_depth.data[2] = net.one.bias.data[2] = 0
    plan = plan_removal(net, channels)
    return channels, plan


PENALTIES = {
    "squares": lambda net: 0.1 * sum(p.square().sum() for p in net.parameters()),
    "magnitudes": lambda net: 0.1 * sum(p.abs().sum() for p in net.parameters()),
    "none": lambda net: 0.0,
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_on_what_goes_refute_nothing(penalty):
    """A loss that changes by a penalty on the weights that are gone is no reason to keep them."""
    net, x = Summed(PENALTIES[penalty]), torch.randn(6, 5)
    channels, plan = one_dead(net, x)
    assert plan.widths == {"one": (8, 7)}
    proved, _ = prove(net, channels, plan, [Replay(lambda copied, dtype: copied.step(x.to(dtype)))])
    assert proved.widths == plan.widths


@pytest.mark.parametrize("scale", ["width", "mean of all weights"])
def test_a_loss_with_other_gradients_is_refuted(scale):
    """A loss that changes what is left in another way than by a constant keeps the channels."""
    factors = {
        "width": lambda net: net.one.out_features / 8,
        "mean of all weights": lambda net: 1 + net.one.weight.abs().mean(),
    }

    class Scaled(Summed):
        def step(self, x):
            return super().step(x) * factors[scale](self)

    net, x = Scaled(lambda _: 0.0), torch.randn(6, 5)
    channels, plan = one_dead(net, x)
    assert bool(plan) is (scale == "width")  # no operation sees a width; a mean over channels is seen, and pins them
    proved, _ = prove(net, channels, plan, [Replay(lambda copied, dtype: copied.step(x.to(dtype)))])
    assert not proved


def test_a_loss_whose_graph_is_used_up_refutes():
    """A step that makes its own backward, so that no gradients can be compared, keeps channels and raises nothing."""

    class Raw(Summed):
        def step(self, x):
            loss = super().step(x)
            loss.backward()
            return loss

    net, x = Raw(PENALTIES["squares"]), torch.randn(6, 5)
    channels, plan = one_dead(net, x)
    assert plan
    proved, _ = prove(net, channels, plan, [Replay(lambda copied, dtype: copied.step(x.to(dtype)))])
    assert not proved
    assert "dry run" in str(proved)


class Attention(nn.Module):
    """Attention whose number of heads and width are in its code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.heads, self.width = nn.Linear(width, width), heads, width // heads

    def forward(self, x):
        parts = (
            f(x).view(*x.shape[:2], self.heads, self.width).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.width))


class Encoder(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.one(x))
        return x + self.hidden(self.two(x))


RUNS: list = []


class Counting(nn.Module):
    """Counts how often it is run, over all its copies."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Encoder(8) for _ in range(blocks)])

    def forward(self, x):
        RUNS.append(self.training)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", [2, 12])
def test_alike_blocks_are_refuted_together(blocks):
    """Whatever their number, blocks of attention with a width in the code cost at most twelve steps; the rest goes."""
    net, x = Counting(blocks), torch.randn(2, 5, 6)
    convert(net)
    channels, _ = watched(net, x)
    with torch.no_grad():
        for block in net.blocks:  # one position of both heads
            for layer, dead in ((block.attention.value, [1, 5]), (block.hidden[0], [3])):
                layer.bit_depth[dead] = layer.bias[dead] = 0
    plan = plan_removal(net, channels)
    assert len(plan.widths) == 2 * blocks
    RUNS.clear()
    proved, after = prove(net, channels, plan, [Replay(replay(x))])
    assert len(RUNS) <= 12
    assert proved.widths.keys() == {f"blocks.{i}.hidden.0" for i in range(blocks)}
    again = plan_removal(net, after)
    assert again.widths.keys() == proved.widths.keys()


def test_layers_of_one_sequence_are_no_blocks():
    """Where one layer of a Sequential is wrong the others go: they are layers, not blocks."""

    class Regroups(nn.Module):
        def forward(self, x):
            return x.view(len(x), 2, 4).flatten(1)

    def layer():
        return nn.Linear(8, 8)

    net, x = nn.Sequential(layer(), nn.ReLU(), layer(), Regroups(), layer(), nn.ReLU(), layer()), torch.randn(4, 8)
    channels, plan = half_dead(net, x)
    proved, _ = prove(net, channels, plan, [Replay(replay(x))])
    assert proved.widths.keys() == plan.widths.keys() - {"2"}


def test_a_duration_refutes_nothing():
    """An output that differs from run to run is not compared; the others are."""
    clock = iter(range(10**6))

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(self.one(x).relu())

    net, x = Timed(), torch.randn(4, 5)
    channels, plan = half_dead(net, x)
    step = Replay(lambda n, dtype: (n(x.to(dtype)), torch.tensor(float(next(clock)))))
    assert prove(net, channels, plan, [step])[0].channels == plan.channels
