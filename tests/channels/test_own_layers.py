"""Layers that torch does not define in the channel graph: their channels go exactly, in any orientation."""

import pytest
import torch
from killing import difference, half_removed, watched
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress.channels.weight_roles import WeightRoles
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.size.report import size_report


class Own(nn.Module):
    """Weights of a module's own, and a function of them and of an input."""

    def __init__(self, call, **shapes):
        super().__init__()
        self.call, self.last = call, nn.Linear(8, 3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.last(self.call(self, x))


def gated(m, x):
    """Experts that a gate weighs, one after the other."""
    share = (x @ m.gate).softmax(-1)
    return sum(share[:, i : i + 1] * (F.linear(x, m.up[i]).relu() @ m.down[i]) for i in range(3))


def picked(m, x):
    """Experts of which every row has one, as a gather of weights."""
    numbers = torch.arange(len(x)) % 3
    hidden = torch.bmm(x.unsqueeze(1), m.up.mT[numbers]).relu()
    return torch.bmm(hidden, m.down.mT[numbers]).squeeze(1)


def in_parts(m, x):
    """Experts with a gate and a value in one weight."""
    out = []
    for up, down in zip(m.up, m.down, strict=True):
        gate, value = F.linear(x, up).chunk(2, dim=-1)
        out.append(F.linear(gate.sigmoid() * value, down))
    return torch.stack(out).sum(0)


def all_at_once(m, x):
    """Experts in batched products."""
    hidden = torch.bmm(x.expand(3, *x.shape), m.up.mT).relu()
    return torch.bmm(hidden, m.down.mT).sum(0)


def attended(m, x):
    """Rows that a vector for each head scores, weighed by their scores."""
    h = (x @ m.up).unflatten(-1, (2, -1))
    scores = F.leaky_relu((h * m.towards).sum(-1) + (h.flip(0) * m.away).sum(dim=-1), 0.2)
    return (h * scores.softmax(0).unsqueeze(-1)).flatten(1) @ m.down


NETS = {
    "rows, then columns": (lambda m, x: F.linear(x, m.a).relu() @ m.b, {"a": (6, 5), "b": (6, 8)}, {"a": 6, "b": 8}),
    "columns, then rows": (
        lambda m, x: F.linear(torch.addmm(torch.zeros(()).to(x), x, m.a).relu(), m.b),
        {"a": (5, 6), "b": (8, 6)},
        {"b": 8},
    ),
    "weight first": (lambda m, x: (m.b @ (m.a @ x.t()).relu()).t(), {"a": (6, 5), "b": (8, 6)}, {"a": 6, "b": 8}),
    "einsum": (
        lambda m, x: torch.einsum("bi,io->bo", torch.einsum("bi,oi->bo", x, m.a).relu(), m.b),
        {"a": (6, 5), "b": (6, 8)},
        {"a": 6, "b": 8},
    ),
    "heads": (
        lambda m, x: torch.einsum("bhk,hkd->bd", torch.einsum("bd,hdk->bhk", x, m.a).relu(), m.b),
        {"a": (2, 5, 4), "b": (2, 4, 8)},
        {"b": 8},
    ),
    "convolution": (
        lambda m, x: F.conv1d(F.conv1d(x[..., None], m.a).relu(), m.b).squeeze(-1),
        {"a": (6, 5, 1), "b": (8, 6, 1)},
        {"a": 6, "b": 8},
    ),
    "transposed convolution": (
        lambda m, x: F.conv_transpose1d(F.conv_transpose1d(x[..., None], m.a).relu(), m.b).squeeze(-1),
        {"a": (5, 6, 1), "b": (6, 8, 1)},
        {"a": 6, "b": 8},
    ),
    "embedding": (lambda m, x: F.embedding(x.argmax(1), m.a) @ m.b, {"a": (5, 6), "b": (6, 8)}, {"a": 6, "b": 8}),
    "vectors of attention": (
        attended,
        {"up": (5, 12), "towards": (1, 2, 6), "away": (1, 2, 6), "down": (12, 8)},
        {"up": 6, "towards": 0, "down": 8},
    ),
    "experts": (gated, {"gate": (5, 3), "up": (3, 6, 5), "down": (3, 6, 8)}, {"up": 6, "down": 8}),
    "experts picked": (picked, {"up": (3, 6, 5), "down": (3, 8, 6)}, {"up": 6, "down": 8}),
    "experts in parts": (in_parts, {"up": (3, 12, 5), "down": (3, 8, 6)}, {"up": 6, "down": 8}),
    "experts at once": (all_at_once, {"up": (3, 6, 5), "down": (3, 8, 6)}, {"up": 6, "down": 8}),
}


def found(name):
    """A network in float64 whose own weights are found by what they do, and an input."""
    call, shapes, _ = NETS[name]
    torch.manual_seed(0)
    net, x = Own(call, **shapes).double(), torch.randn(4, 5).double()
    with WeightRoles(net) as roles:
        net(x)
    convert(net, axes={n: axis for n, axis in roles.axes().items() if not isinstance(axis, str)})
    return net, x


@pytest.mark.parametrize("name", NETS)
def test_channels_go_exactly(name):
    """So many channels of each weight may go, and a removal of half of them changes no output."""
    net, x = found(name)
    channels, watcher = watched(net, x)
    assert watcher.failures == []
    free = {}
    for p in quantized_parameters(net):
        own = channels.of(f"{p.name}_bit_depth", 0) if p.name != "last.weight" else channels.of("last.bit_depth", 0)
        free[p.name] = len({int(n) for n in own if channels.removable()[n]})
    wanted = NETS[name][2]
    assert {n: free[n] for n in wanted} == wanted
    for seed in range(3):
        net, x = found(name)
        smaller, plan = half_removed(net, watched(net, x)[0], seed)
        assert plan
        assert difference(net, smaller, x) < 1e-10


@pytest.mark.parametrize("name", [name for name in NETS if name.startswith("experts")])
def test_experts_stay(name):
    """A channel dies when it is dead in all experts; one that is dead in some of them stays, and so do the experts."""
    net, x = found(name)
    channels, _ = watched(net, x)
    experts = channels.of("up", 0)
    assert not channels.removable()[experts].any()
    depths = channels.of("up_bit_depth", 0).reshape(3, -1)
    assert (depths == depths[0]).all()


def test_experts_of_one_channel():
    """An expert whose only channel is dead stays, as no weight could lose it alone."""
    net = Own(lambda m, x: torch.cat([F.linear(x, w) for w in m.up], 1) @ m.down, up=(3, 1, 5), down=(3, 8)).double()
    convert(net, axes={"up": ChannelAxis(1, groups=3), "down": ChannelAxis(1)})
    channels, _ = watched(net, torch.randn(4, 5).double())
    assert not channels.removable()[channels.of("up_bit_depth", 0)].any()


def test_weights_of_experts_count_while_their_inputs_live():
    """A weight of an expert counts as far as its inputs are alive, whatever dimension they lie along."""
    net, x = found("experts")
    couple(net, watched(net, x)[0])
    with torch.no_grad():
        net.up_bit_depth.view(3, 6)[:, :2] = 0.0
        net.forget_quantized()
    bits = {layer.name: layer.learned_bits for layer in size_report(net).layers}
    assert (bits["up"], bits["down"]) == (8 * 3 * 4 * 5, 8 * 3 * 8 * 4)
