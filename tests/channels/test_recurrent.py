"""The hidden channels of recurrent layers go exactly, wherever their state starts and ends."""

import copy

import pytest
import torch
from killing import assert_exact, converted, difference, half_removed, watched
from row_networks import TOKENS
from torch import nn

from lightning_selfcompress.files.export import export
from lightning_selfcompress.files.load import load
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.removal.trial import Replay

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own remark on speed


class Reader(nn.Module):
    """A recurrent layer of torch's, read at every step."""

    def __init__(self, kind=nn.LSTM, width=6, **options):
        super().__init__()
        self.rnn, self.head = kind(5, 6, batch_first=True, **options), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Cells(nn.Module):
    """A cell that is called step by step, whose state starts at zeros of the cell's own width."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = torch.zeros(len(x), self.cell.hidden_size).to(x)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        out = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(out, 1))


class Translator(nn.Module):
    """The state of an encoder, in which sequences of no length start at zeros, goes to a decoder and to its attention.

    Args:
        kind: The class of both layers.
        width: The width of the state, read from an attribute of this module.
        learned: Whether a linear layer makes the encoder's first state, instead of zeros.
    """

    def __init__(self, kind=nn.LSTM, width=6, *, learned=False):
        super().__init__()
        self.hidden_size, self.start = width, nn.Linear(5, width) if learned else None
        self.encoder, self.decoder = (kind(5, width, num_layers=2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(2 * width, 3)

    def first(self, x):
        if self.start is not None:
            return self.start(x[:, 0]).expand(2, -1, -1).contiguous()
        return torch.zeros(2, x.shape[0], self.hidden_size, dtype=x.dtype, device=x.device)

    def forward(self, x):
        is_lstm, h = isinstance(self.encoder, nn.LSTM), self.first(x)
        memory, state = self.encoder(x, (h, torch.zeros_like(h)) if is_lstm else h)
        empty = torch.tensor([True, False, False]).view(1, -1, 1)
        state = tuple(t.masked_fill(empty, 0.0) for t in state) if is_lstm else state.masked_fill(empty, 0.0)
        out, _ = self.decoder(x, state)
        read = (out @ memory.mT).softmax(-1) @ memory
        return self.head(torch.cat([out, read], -1))


class Gates(nn.Module):
    """A user's own cell of two linear layers, whose gates are cut apart."""

    def __init__(self):
        super().__init__()
        self.n_hidden, self.into, self.again, self.head = 6, nn.Linear(5, 24), nn.Linear(6, 24), nn.Linear(6, 3)

    def forward(self, x):
        h = c = torch.zeros(len(x), self.n_hidden, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (self.into(step) + self.again(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


NETS = {
    "LSTM": Reader,
    "GRU": lambda: Reader(nn.GRU),
    "RNN": lambda: Reader(nn.RNN, bias=False),
    "RNN, relu": lambda: Reader(nn.RNN, nonlinearity="relu"),
    "LSTM, two layers, both ways": lambda: Reader(num_layers=2, bidirectional=True, width=12),
    "GRU, both ways": lambda: Reader(nn.GRU, bidirectional=True, width=12),
    "LSTM, projected": lambda: Reader(num_layers=2, proj_size=4, width=4),
    "LSTMCell": lambda: Cells(nn.LSTMCell),
    "GRUCell": lambda: Cells(nn.GRUCell),
    "RNNCell": lambda: Cells(nn.RNNCell),
    "encoder and decoder, learned start": lambda: Translator(learned=True),
}
AROUND = {  # the width of the state is an attribute of another module
    "encoder and decoder": Translator,
    "encoder and decoder, GRU": lambda: Translator(nn.GRU),
    "gates": Gates,
}


def hidden(channels):
    """The channels of all states, by the name of a weight that reads them."""
    names = [s.name for s in channels.slots if "weight_hh" in s.name and s.name.endswith(("_l0", "weight_hh"))]
    return {name: channels.of(name, 1) for name in names}


@pytest.mark.parametrize("name", NETS)
def test_states_go(name):
    """Every hidden channel may go, and half of them go exactly."""
    net = converted(NETS[name]())
    channels, watcher = watched(net, TOKENS)
    assert watcher.failures == []
    assert channels.unseen == ()
    assert all(channels.removable()[own].all() for own in hidden(channels).values())
    assert_exact(net, channels, TOKENS)


@pytest.mark.parametrize("name", [*NETS, *AROUND])
def test_the_fused_layer_says_the_same(name):
    """The fused layers of torch, which run in float32, have the channels that the single operations of float64 have."""
    net = converted({**NETS, **AROUND}[name]())
    steps, _ = watched(net, TOKENS)
    fused, watcher = watched(net.float(), TOKENS.float())
    assert watcher.failures == []
    assert watcher.without_rule == set()
    assert (steps.group == fused.group).all()
    assert (steps.removable() == fused.removable()).all()


@pytest.mark.parametrize("name", AROUND)
def test_widths_around_a_layer_go_with_it(name, tmp_path):
    """A state that starts at zeros of a width of another module's goes with that width, also into a file."""
    net = converted(AROUND[name]())
    channels, watcher = watched(net, TOKENS)
    assert watcher.failures == []
    _, plan = half_removed(net, channels)
    proved, refuted = prove(net, channels, plan, [Replay(lambda m, dtype: m(TOKENS.to(dtype)))])
    assert len(proved.channels) == len(plan.channels) > 1
    assert refuted is channels
    smaller = copy.deepcopy(net)
    remove(smaller, proved.edits)
    assert difference(net, smaller, TOKENS) < 1e-10
    attribute = "n_hidden" if name == "gates" else "hidden_size"
    assert getattr(smaller, attribute) == 6 - len(proved.channels)
    export(smaller, tmp_path / "net.scnn")
    loaded = load(tmp_path / "net.scnn", into=AROUND[name]().double())
    assert torch.allclose(loaded.eval()(TOKENS), smaller.eval()(TOKENS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [torch.ones, torch.randn])
def test_a_state_that_does_not_start_at_zero_stays(start):
    """A hidden channel that starts at another number is not zero when its gates are dead, so it stays."""

    class Started(Reader):
        def forward(self, x):
            state = start(1, len(x), self.rnn.hidden_size, dtype=x.dtype)
            return self.head(self.rnn(x, (state, state.clone()))[0])

    for dtype in (torch.float64, torch.float32):
        net = converted(Started()).to(dtype)
        channels, _ = watched(net, TOKENS.to(dtype))
        assert not channels.removable()[channels.of("rnn.weight_hh_l0", 1)].any()
        reason = channels.pinned[int(channels.of("rnn.weight_hh_l0", 1)[0])]
        assert reason.startswith("LSTM at rnn sums over it, and")


def test_a_width_in_the_code_stays():
    """A state whose width is a number in the code is refuted by a dry run, whatever attributes there are."""

    class Written(Translator):
        def first(self, x):
            return torch.zeros(2, len(x), 6, dtype=x.dtype)

    net = converted(Written())
    channels, _ = watched(net, TOKENS)
    _, plan = half_removed(net, channels)
    proved, refuted = prove(net, channels, plan, [Replay(lambda m, dtype: m(TOKENS.to(dtype)))])
    assert not proved
    assert not refuted.removable().any()
