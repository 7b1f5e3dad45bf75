"""Attention: whole heads go, with the attributes that hold their number and width; so do positions within heads."""

import copy

import pytest
import torch
from killing import converted, difference, removable_of, watched
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.files.export import export
from lightning_selfcompress.files.finalize import finalize
from lightning_selfcompress.files.load import load
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.heads import PART_OF_A_HEAD
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import changed_sizes, remove, take_sizes
from lightning_selfcompress.removal.trial import Replay

WIDTH, HEADS, DIM = 12, 3, 4
X = torch.randn(2, 5, 6, dtype=torch.float64)


class Attention(nn.Module):
    """Heads of separate projections."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.n_head, self.head_dim, self.embed_dim = heads, width // heads, width

    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_head, self.head_dim).transpose(1, 2)

    def joined(self, y):
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], self.embed_dim)

    def forward(self, x):
        return self.o(self.joined(self.mixed(*(self.heads(f(x)) for f in (self.q, self.k, self.v)))))


class NoNumber(Attention):
    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def joined(self, y):
        return y.transpose(1, 2).flatten(2)


class NoWidth(NoNumber):
    """The width of a head follows from the number of heads, and the scale is a number."""

    def mixed(self, q, k, v):
        return (q @ k.mT * 0.5).softmax(-1) @ v

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)


class Packed(Attention):
    """One projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 3 * WIDTH)
        self.k = self.v = nn.Identity()
        self.split_size = WIDTH

    def forward(self, x):
        parts = self.q(x).split(self.split_size, 2)
        return self.o(self.joined(self.mixed(*map(self.heads, parts))))


class Stacked(Packed):
    def __init__(self) -> None:
        super().__init__()
        del self.split_size

    def forward(self, x):
        parts = self.q(x).reshape(*x.shape[:2], 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.o(self.joined(self.mixed(*parts.unbind(0))))


class Grouped(NoNumber):
    """Two heads of queries for each head of keys and values."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.q, self.o = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)))


class GroupedInside(Grouped):
    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Biased(NoNumber):
    """A learned table of one number for each head."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(width, heads)
        self.table = nn.Parameter(torch.randn(heads, 1, 1))

    def mixed(self, q, k, v):
        return (q @ k.mT + self.table).softmax(-1) @ v


class InCode(Attention):
    def joined(self, y):
        return y.transpose(1, 2).reshape(2, 5, 12)


class Block(nn.Module):
    """Attention on a residual stream that a normalization needs as a whole."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.attention = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), attention
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attention(self.norm(x)))


def network(kind: type[nn.Module]) -> tuple[nn.Module, Channels]:
    torch.manual_seed(0)
    net = converted(Block(kind()))
    channels, watcher = watched(net, X)
    assert watcher.failures == []
    return net, channels


@torch.no_grad()
def kill(net: nn.Module, **dead: list[int]) -> None:
    for name, numbers in dead.items():
        layer = net.attention.get_submodule(name)
        layer.bit_depth[numbers] = layer.bias[numbers] = 0
        layer.forget_quantized()


def proved(net: nn.Module, channels: Channels):
    plan = plan_removal(net, channels)
    plan, channels = prove(net, channels, plan, [Replay(lambda n, dtype: n(X.to(dtype)))])
    smaller = copy.deepcopy(net)
    remove(smaller, plan.edits)
    assert difference(net, smaller, X) < 1e-10
    return plan, channels, smaller


SECOND, FIRST_OF_ALL = list(range(DIM, 2 * DIM)), [0, DIM, 2 * DIM]
ALL = {"q": SECOND, "k": SECOND, "v": SECOND}
IN_THIRDS = {"q": [WIDTH * i + n for i in range(3) for n in SECOND]}
IN_GROUPS = {"q": list(range(2 * DIM, 4 * DIM)), "k": SECOND, "v": SECOND}
WHOLE = {
    Attention: (ALL, {"n_head": 2, "embed_dim": 8}),
    NoNumber: (ALL, {}),
    NoWidth: (ALL, {"n_head": 2}),
    Packed: (IN_THIRDS, {"n_head": 2, "embed_dim": 8, "split_size": 8}),
    Stacked: (IN_THIRDS, {"n_head": 2, "embed_dim": 8}),
    Grouped: (IN_GROUPS, {}),
    GroupedInside: (IN_GROUPS, {}),
    Biased: (ALL, {}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_dead_head_goes(kind):
    """A head that is dead as a whole goes exactly, with the attributes without which the shapes would be wrong."""
    dead, sizes = WHOLE[kind]
    net, channels = network(kind)
    kill(net, **dead)
    plan, _, smaller = proved(net, channels)
    assert smaller.attention.o.in_features == net.attention.o.in_features * 2 // 3
    assert changed_sizes(smaller) == {f"attention.{name}": value for name, value in sizes.items()}
    assert changed_sizes(net) == {}
    if kind is Biased:
        assert smaller.attention.table.shape == (2, 1, 1)
    else:
        assert plan.refusals == ()


def test_a_head_whose_values_are_dead_goes():
    """A head that returns zeros goes with its queries and keys, though these are alive."""
    net, channels = network(Attention)
    kill(net, v=SECOND)
    plan, _, smaller = proved(net, channels)
    assert plan.widths == {f"attention.{name}": (12, 8) for name in "qkv"}
    assert smaller.attention.n_head == 2


@pytest.mark.parametrize("dead", [{"q": SECOND, "k": SECOND}, {"v": SECOND[1:]}, {"v": [0, 5, 10]}], ids=str)
def test_parts_of_heads_stay(dead):
    """A head with living values stays, and so do channels at different positions of heads; the reason is told."""
    net, channels = network(NoWidth)
    kill(net, **dead)
    plan, _, _ = proved(net, channels)
    assert not plan
    assert {why for _, why in plan.refused} == {PART_OF_A_HEAD}


def test_a_position_of_all_heads_goes():
    """Values at one position of all heads go with their inputs of the next layer, and queries with their keys."""
    net, channels = network(NoWidth)
    kill(net, v=FIRST_OF_ALL)
    _, _, smaller = proved(net, channels)
    assert (smaller.attention.v.out_features, smaller.attention.o.in_features) == (9, 9)
    kill(net, q=FIRST_OF_ALL, k=FIRST_OF_ALL)
    _, _, smaller = proved(net, channels)
    assert [smaller.attention.get_submodule(n).out_features for n in "qkv"] == [9, 9, 9]


def test_heads_and_positions_go_together():
    """What goes with a head counts for no position, and the other heads lose their position."""
    net, channels = network(NoWidth)
    kill(net, q=[0, 8], k=[0, 8], v=[0, *SECOND, 8])
    _, _, smaller = proved(net, channels)
    assert [smaller.attention.get_submodule(n).out_features for n in "qkv"] == [6, 6, 6]
    assert smaller.attention.n_head == 2


def test_refuted_positions_leave_heads_free():
    """Where the code has the width of a head, positions stay for good, and heads go all the same."""
    net, channels = network(Attention)
    kill(net, v=FIRST_OF_ALL)
    plan, channels, _ = proved(net, channels)
    assert not plan
    kill(net, v=SECOND)
    plan, channels, smaller = proved(net, channels)
    assert smaller.attention.n_head == 2
    assert channels.without_numbers(plan.channels).describes(smaller)


def test_refuted_heads_leave_no_half_removal():
    """Where the code has the width of all heads, heads stay for good, and nothing of them goes."""
    net, channels = network(InCode)
    kill(net, **ALL)
    plan, channels, _ = proved(net, channels)
    assert not plan
    assert plan.refusals[0].startswith("4 dead in attention.q stay: InCode at attention has the number of its heads in")
    assert not plan_removal(net, channels)
    again = Watcher(net, earlier=Channels.from_state_dict(channels.state_dict()))
    with again:
        net(X)
    assert not plan_removal(net, again.channels())


def test_one_head_is_left():
    """A layer whose heads are all dead keeps one."""
    net, channels = network(Attention)
    kill(net, **{name: list(range(WIDTH)) for name in "qkv"})
    _, _, smaller = proved(net, channels)
    assert smaller.attention.n_head == 1
    assert smaller.attention.q.out_features == DIM


def test_later_steps_know_the_heads():
    """A step that runs no attention forgets no head that an earlier step has shown."""
    net, channels = network(Attention)
    watcher = Watcher(net, earlier=channels)
    with watcher:
        net.stem(X)
    later = watcher.channels()
    assert not later.differs_from(channels)
    kill(net, v=[0, 1])
    assert not plan_removal(net, later)


def test_returned_weights_keep_the_heads():
    """Heads whose weights the network keeps stay, all of them; positions within them may go."""

    class Returns(NoNumber):
        def mixed(self, q, k, v):
            self.weights = (q @ k.mT).softmax(-1)
            return self.weights @ v

    _, channels = network(Returns)
    assert len(channels.cells) == 0
    assert removable_of(channels, "attention.q") == DIM


def test_dimensions_that_are_no_heads_go_as_before():
    """Groups that no product of matrices takes one by one lose the same channels each."""

    class Shuffle(nn.Module):
        def forward(self, x):
            return x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

    net = converted(nn.Sequential(nn.Conv2d(2, 8, 1), Shuffle(), nn.Conv2d(8, 3, 1)))
    channels, _ = watched(net, torch.randn(2, 2, 3, 3, dtype=torch.float64))
    assert removable_of(channels, "0") == 4
    assert len(channels.cells) == 0


def test_files_know_the_attributes(tmp_path):
    """A packed file brings the attributes along, for a network as it was built; a plain copy keeps them."""
    net, channels = network(Packed)
    kill(net, **IN_THIRDS)
    _, _, smaller = proved(net, channels)
    export(smaller, tmp_path / "net.scnn")
    plain = load(tmp_path / "net.scnn", into=Block(Packed()).double())
    assert plain.attention.split_size == 8
    assert torch.equal(plain.eval()(X), smaller.eval()(X))
    assert torch.equal(finalize(smaller).eval()(X), smaller(X))
    with pytest.warns(UserWarning, match="Nothing"):
        export(finalize(smaller), tmp_path / "again.scnn")
    assert changed_sizes(load(tmp_path / "again.scnn", into=Block(Packed()).double())) == changed_sizes(smaller)


def test_attributes_take_their_first_values_again():
    """A network that takes the sizes of a larger one has the attributes it was built with."""
    net, channels = network(Attention)
    kill(net, **ALL)
    _, _, smaller = proved(net, channels)
    take_sizes(smaller, {"attention.n_head": 2})
    assert (smaller.attention.n_head, smaller.attention.embed_dim) == (2, 12)
    take_sizes(smaller, {})
    assert (smaller.attention.n_head, changed_sizes(smaller)) == (3, {})
