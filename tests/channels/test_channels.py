"""The channel graph of whole networks: what belongs together, and what has to stay."""

import random

import numpy as np
import pytest
import torch
from graph_nets import IMAGES, Calling, X, small_net
from killing import assert_exact, converted, difference, half_removed, reason, removable_of, watched
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from zoo import ZOO

from lightning_selfcompress.channels.atoms import AtomStore
from lightning_selfcompress.tensors import stored_tensors

SIZES_IN_PYTHON = {
    "vit",
    "masked_transformer",
    "char_transformer",
}  # attention writes its width into a shape: for the dry run


# Networks


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    """In every common architecture channels go exactly, and no rule fails."""
    net = converted(ZOO[name].make())
    inputs = [t.double() if t.is_floating_point() else t for t in ZOO[name].inputs()]
    channels, watcher = watched(net, *inputs)
    assert watcher.failures == []
    assert channels.unseen == ()
    smaller, plan = half_removed(net, channels)
    assert plan
    if name not in SIZES_IN_PYTHON:
        assert difference(net, smaller, *inputs) < 1e-10


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_are_not_saved(persistent):
    """Channels along a buffer that no file holds stay: a fresh network could not tell which of its entries are left."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("gate", torch.rand(8), persistent=persistent)

        def forward(self, x):
            return self.second(self.first(x) * self.gate)

    net = converted(Gated())
    channels, _ = watched(net, X)
    assert removable_of(channels, "first") == (8 if persistent else 0)
    if persistent:
        assert_exact(net, channels, X)
    else:
        assert reason(channels, "first") == "'gate' has them, a buffer that is not saved"


CONVOLUTIONAL = [name for name in ZOO if ZOO[name].convolutional]
FEW = {
    "resnet_pad": 0.6,  # constant channels
    "depthwise_multiplier": 0.6,  # most others are outputs
    "ghost": 0.5,  # slices by numbers
    "shufflenet": 0.5,  # a few large groups
    "group_norm": 0.4,
    "convnext": 0.5,  # layer normalization
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_lose_channels(name):
    """Of the channels of convolutional networks, at least seven in ten can go, but for a few networks."""
    net = converted(ZOO[name].make())
    channels, _ = watched(net, *(t.double() if t.is_floating_point() else t for t in ZOO[name].inputs()))
    assert channels.removable().sum() >= FEW.get(name, 0.7) * channels.produced().sum()


def test_tied_weights():
    """A weight that two layers share belongs to the channels of both."""
    net = Calling(lambda self, x: self.last(self.other(self.tied(self.first(x)).relu())))
    net.tied, net.other = nn.Linear(8, 8), nn.Linear(8, 8)
    net.other.weight = net.tied.weight
    channels, _ = watched(converted(net), X)
    assert (channels.of("first.bit_depth", 0) == channels.of("tied.bit_depth", 0)).all()
    assert_exact(net, channels, X)


def test_shared_modules():
    """A module that is called twice joins what it is called with."""
    net = converted(Calling(lambda self, x: self.last(self.mid(self.mid(self.first(x)).relu())), mid=nn.Linear(8, 8)))
    channels, _ = watched(net, X)
    assert removable_of(channels, "first") == 8
    assert (channels.of("first.bit_depth", 0) == channels.of("mid.bit_depth", 0)).all()
    assert_exact(net, channels, X)


def test_outputs_stay():
    """What a network returns stays, wherever in a structure it is."""
    net = Calling(lambda self, x: {"logits": (self.last(F.relu(self.first(x))), [self.side(x)])}, side=nn.Linear(5, 4))
    channels, _ = watched(converted(net), X)
    assert removable_of(channels, "first") == 8
    for name in ("last", "side"):
        assert removable_of(channels, name) == 0
        assert reason(channels, name) == "it is an output of the network"


def test_inputs_in_dictionaries():
    """Inputs may come in any structure."""
    net = Calling(lambda self, batch: self.last(F.relu(self.first(batch["x"][0])) * batch["scale"]))
    net = converted(net)
    batch = {"x": [X], "scale": torch.rand(4, 1).double()}
    channels, _ = watched(net, batch)
    assert removable_of(channels, "first") == 8
    assert_exact(net, channels, batch)


def test_a_single_output():
    """A weight of one row is no vector that goes to zero: what it sums over has to be zero when dead."""
    net = Calling(lambda self, x: self.side(self.first(x).sigmoid()) * self.last(self.first(x)), side=nn.Linear(8, 1))
    channels, _ = watched(converted(net), X)
    assert (
        reason(channels, "first")
        == "Linear at side sums over it, and sigmoid leaves it other than zero when it is dead"
    )


def test_rows_picked_by_numbers():
    """Where rows of a weight are looked up, they stay."""
    net = Calling(lambda self, x: self.last(self.first(x)) + F.embedding(torch.tensor(2), self.first.weight).mean())
    channels, _ = watched(converted(net), X)
    assert reason(channels, "first") == "embedding picks rows by their numbers"


# Writes in place and through views


def half_written(x):
    x[:, : x.shape[1] // 2] = x[:, x.shape[1] // 2 :]


def four_written(x):
    x[:, 1:5] = 0.5


def view_no_longer_zero(x):
    x.view(x.shape[0], -1).sigmoid_()


def view_scaled(x):
    x.view(x.shape[0], -1).mul_(2)


def view_turned(x):
    x.t().cos_()


def other_channels(x):
    x.view(-1)[: x.shape[0]] = 1.0


@pytest.mark.parametrize(
    ("write", "free", "why"),
    [
        (half_written, 4, ""),
        (four_written, 0, "slice takes channels by their numbers"),
        (view_no_longer_zero, 0, "Linear at last sums over it, and sigmoid leaves it"),
        (view_scaled, 8, ""),
        (view_turned, 0, "Linear at last sums over it, and cos leaves it other"),
        (other_channels, 0, ""),
    ],
)
def test_writes_through_views(write, free, why):
    """What is written through a view is known of all the memory's tensors."""

    def call(self, x):
        x = self.first(x)
        seen = x.detach()
        write(x)
        return self.last(seen + 0 * x)

    net = converted(Calling(call))
    channels, watcher = watched(net, X)
    assert watcher.failures == []
    assert removable_of(channels, "first") == free
    assert why in reason(channels, "first")
    assert difference(net, half_removed(net, channels)[0], X) < 1e-10


def test_shape_changed_in_place():
    """A tensor whose shape changes in place is followed, or its channels stay."""
    net = converted(Calling(lambda self, x: self.last(self.first(x).unsqueeze_(1).transpose_(1, 2).squeeze(2))))
    channels, watcher = watched(net, X)
    assert watcher.failures == []
    assert difference(net, half_removed(net, channels)[0], X) < 1e-10


# What parameters are used for


def penalized(penalty):
    net = converted(Calling(lambda self, x: self.last(self.first(x).relu())))
    y = torch.randint(3, (4,))

    def step():
        return F.cross_entropy(net(X), y) + penalty(net)

    return watched(net, step=step)[0]


@pytest.mark.parametrize(
    "penalty",
    [
        lambda net: sum(p.pow(2).sum() for p in net.parameters()),
        lambda net: sum(p.norm() for p in net.parameters()),
        lambda net: torch.cat([p.flatten() for p in net.parameters()]).norm(),
        lambda net: torch.stack([p.abs().mean() for p in net.parameters()]).sum(),
        lambda net: net.last.weight.norm(dim=0).sum(),
        lambda net: 0.1 * net.first.weight.abs().amax(),
    ],
)
def test_penalties_on_parameters_are_harmless(penalty):
    """A penalty on parameters pins nothing, norms over everything and group norms included."""
    assert removable_of(penalized(penalty), "first") == 8


@pytest.mark.parametrize(
    "size", [lambda w: w.norm(), lambda w: w.abs().mean(), lambda w: 1 + w.abs().amax(1, keepdim=True)]
)
def test_weights_scaled_by_their_size(size):
    """A weight stays that is scaled by a number computed from all of it."""
    net = Calling(
        lambda self, x: F.linear(self.first(x).relu(), self.last.weight / size(self.last.weight), self.last.bias)
    )
    net = converted(net)
    channels, _ = watched(net, X)
    assert removable_of(channels, "first") == 0
    assert "needs every channel of its input" in reason(channels, "first")


def test_an_activation_in_the_loss_stays():
    """The mean of an activation in the loss pins it, its sum does not."""
    net = converted(small_net())

    def step(reduce):
        hidden = net[:3](IMAGES)
        return net[3:](hidden).sum() + reduce(hidden)

    assert removable_of(watched(net, step=lambda: step(torch.sum))[0], "0") == 8
    channels, _ = watched(net, step=lambda: step(torch.mean))
    assert removable_of(channels, "0") == 0
    assert reason(channels, "0") == "mean needs every channel of its input"


def test_a_learned_number_shifts():
    """A learned number that is added pins, one that is multiplied with does not."""
    net = Calling(lambda self, x: self.last(self.first(x).relu() * self.scale))
    net.scale = nn.Parameter(torch.tensor(2.0))
    channels, _ = watched(converted(net), X)
    assert removable_of(channels, "first") == 8
    net.call = lambda self, x: self.last(self.first(x).relu() + self.scale)
    channels, _ = watched(net, X)
    assert removable_of(channels, "first") == 0
    assert reason(channels, "first") == "Linear at last sums over it, and add leaves it other than zero when it is dead"


# The channels themselves


def test_groups_are_the_connected_components():
    """Atoms that were tied, in whatever order, share a group, and the first reason for a pin is kept."""
    rng = random.Random(0)
    for _ in range(50):
        store, expected = AtomStore(), {}
        atoms = store.new(30)
        expected = {int(a): {int(a)} for a in atoms}
        for _ in range(rng.randrange(30)):
            one, other = rng.choice(atoms), rng.choice(atoms)
            store.tie(np.array([one]), np.array([other]), "")
            union = expected[one] | expected[other]
            expected |= dict.fromkeys(union, union)
        group, pinned = store.groups()
        assert group[0] == 0
        assert pinned == {}
        for a in atoms:
            assert set(np.flatnonzero(group == group[a])) == expected[a]


def test_what_meets_no_channel_is_pinned():
    """A tie with a position that belongs to no channel pins, and the first reason is kept."""
    store = AtomStore()
    atoms = store.new(3)
    store.tie(atoms, np.array([0, atoms[2], 0]), "first")
    store.tie(np.array([0, atoms[2]]), atoms[1:], "second")
    store.pin(atoms, "third")
    group, pinned = store.groups()
    assert group[atoms[0]] != group[atoms[1]] == group[atoms[2]]
    assert pinned == {int(group[atoms[0]]): "first", int(group[atoms[1]]): "first"}


def test_rows_and_columns_are_not_blank():
    """Atoms that grids add between blank dimensions belong to none of them, and a copy fixes for itself."""
    store = AtomStore()
    store.new(4)
    blank, row, later = store.blank(3), store.new(2), store.blank(2)
    store.pin(row, "")
    assert not any(store.is_fixed(atoms) for atoms in (blank, row, later))
    store.pin(blank[:1], "")
    assert store.is_fixed(blank)
    assert not store.is_fixed(row)
    copied = store.copy()
    copied.pin(later[1:], "")
    assert (copied.is_fixed(later), store.is_fixed(later)) == (True, False)
    merged, mixed = store.new_of(2, blank, later), store.new_of(2, blank, row)
    store.pin(merged[:1], "")
    store.pin(mixed, "")
    assert (store.is_fixed(merged), store.is_fixed(mixed)) == (True, False)


def test_a_blank_dimension_is_fixed_as_a_whole():
    """What is tied to a part of a blank dimension stays once another part is pinned."""
    store = AtomStore()
    atoms = store.new(3)
    one, other = store.blank(4), store.blank(2)
    store.tie(atoms[:1], one[3:], "")
    store.tie(atoms[2:], other[:1], "")
    assert not store.is_fixed(one)
    store.pin(one[:1], "positions")
    assert store.is_fixed(one)
    assert store.is_fixed(one[1:2])
    assert not store.is_fixed(other)
    assert not store.is_fixed(atoms)
    group, pinned = store.groups()
    assert group[:4].tolist() == [0, 1, 2, 3]
    assert {number: why for number, why in pinned.items() if number < 4} == {1: "positions"}


def test_ties_of_different_lengths_are_refused():
    """A rule that ties what does not fit is told so at once, where the operation is still known."""
    store = AtomStore()
    with pytest.raises(ValueError, match="got 3 and 2"):
        store.tie(store.new(3), store.new(2), "")


def test_what_is_tied_again_is_kept_once():
    """A loop that says the same in every turn leaves one tie and the reason that came first."""
    store = AtomStore()
    atoms, other = store.new(3), store.new(3)
    for turn in range(100):
        store.tie(atoms, other, "")
        store.pin(atoms, f"turn {turn}")
    assert len(store._ties) == 2
    group, pinned = store.groups()
    assert pinned == dict.fromkeys(group[other].tolist(), "turn 0")


def test_channels_are_found_by_name():
    """``Channels.of`` says which channels lie along a dimension, and names what it does not know."""
    channels, _ = watched(converted(small_net()), IMAGES)
    assert (channels.of("0.weight", 0) == channels.of("1.running_mean", 0)).all()
    with pytest.raises(KeyError, match=r"'0\.weight', 4"):
        channels.of("0.weight", 4)


def test_pin():
    """Channels that are pinned later have the reason that is given, unless they had one."""
    channels, _ = watched(converted(small_net()), IMAGES)
    first, last = channels.of("0.bit_depth", 0), channels.of("5.bit_depth", 0)
    more = channels.pin([first[0], last[0]], "a dry run failed")
    assert more.pinned[first[0]] == "a dry run failed"
    assert more.pinned[last[0]] == "it is an output of the network"
    assert removable_of(more, "0") == removable_of(channels, "0") - 1


def test_without():
    """After a removal the channels that are left have the numbers they had."""
    net = converted(small_net())
    channels, _ = watched(net, IMAGES)
    smaller, plan = half_removed(net, channels)
    gone = np.zeros(channels.count, bool)
    gone[list(plan.channels)] = True
    left = channels.without(gone)
    tensors = stored_tensors(smaller)
    assert all(tensors[s.name].shape[s.dim] == s.size for s in left.slots)
    kept = channels.of("0.bit_depth", 0)
    assert (left.of("0.bit_depth", 0) == kept[~gone[kept]]).all()


def test_slots():
    """Depths produce; biases, scales and shifts fade; weights and statistics do neither."""
    channels, _ = watched(converted(small_net()), IMAGES)
    kinds = {s.name: (s.produces, s.fades) for s in channels.slots if s.dim == 0}
    assert kinds["0.bit_depth"] == (True, False)
    assert kinds["0.exponent"] == kinds["0.weight"] == kinds["1.running_mean"] == (False, False)
    assert kinds["0.bias"] == kinds["1.weight"] == kinds["1.bias"] == (False, True)
