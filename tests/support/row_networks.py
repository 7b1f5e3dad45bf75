"""Networks whose rows (nodes, tokens, steps, windows) are picked, scattered and added up."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

HIDDEN = 16
SOURCE, TARGET = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 4, 1], [1, 2, 3, 4, 5, 0, 3, 5, 1, 4]])  # edges of six nodes
NODES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
TOKENS = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).double()
PIXELS = torch.randn(2, 8, 8, 5, generator=torch.Generator().manual_seed(0)).double()


def spread(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (x.dim() - 1)).expand_as(x)


class Gcn(nn.Module):
    """Normalized sums over neighbours, biases of their own, batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.bias, self.norm, self.head = (
            nn.Parameter(torch.zeros(HIDDEN)),
            nn.BatchNorm1d(HIDDEN),
            nn.Linear(HIDDEN, 3),
        )

    def propagate(self, x: Tensor) -> Tensor:
        degree = torch.zeros(x.size(0)).to(x).index_add_(0, TARGET, x.new_ones(TARGET.size(0))).clamp(min=1)
        weight = degree.rsqrt()[SOURCE] * degree.rsqrt()[TARGET]
        out = torch.zeros(x.size(0), x.size(1), dtype=x.dtype)
        return out.index_add_(0, TARGET, x[SOURCE] * weight.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.propagate(self.first(x)) + self.bias)
        return self.head(F.relu(self.norm(self.propagate(self.second(x)))))


class Sage(nn.Module):
    """Means over neighbours beside the node itself, normalized to length one."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.ModuleList([nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.own = nn.ModuleList([nn.Linear(5, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        for near, own in zip(self.near, self.own, strict=True):
            messages = x.index_select(0, SOURCE)
            total = x.new_zeros(x.size()).scatter_add_(0, spread(TARGET, messages), messages)
            count = x.new_zeros(x.size(0)).scatter_add_(0, TARGET, x.new_ones(len(TARGET)))
            x = F.normalize(near(total / count.clamp(min=1).unsqueeze(1)) + own(x), dim=-1).relu()
        return self.head(x)


class Gin(nn.Module):
    """Perceptrons of sums over neighbours; each graph's nodes are added up after each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(n, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
            for n in (5, HIDDEN)
        )
        self.head = nn.Linear(2 * HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        graphs, pooled = torch.tensor([0, 0, 0, 1, 1, 1]), []
        for layer in self.layers:
            x = layer((1 + self.eps) * x + torch.zeros_like(x).index_put((TARGET,), x[SOURCE], accumulate=True))
            pooled.append(torch.zeros(2, x.size(1), dtype=x.dtype).index_add_(0, graphs, x))
        return self.head(torch.cat(pooled, 1))


class Gat(nn.Module):
    """Attention over the edges into each node, in two heads."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, size = heads, (2, 1, heads, HIDDEN // heads)
        self.layers = nn.ModuleList(nn.Linear(n, HIDDEN, bias=False) for n in (5, HIDDEN))
        self.towards = nn.ParameterList([torch.randn(size[1:]) for _ in self.layers])
        self.away = nn.ParameterList([torch.randn(size[1:]) for _ in self.layers])
        self.bias, self.head = nn.Parameter(torch.zeros(HIDDEN)), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        for layer, towards, away in zip(self.layers, self.towards, self.away, strict=True):
            h = layer(x).view(n, self.heads, -1)
            scores = F.leaky_relu((h * away).sum(-1)[SOURCE] + (h * towards).sum(-1)[TARGET], 0.2)
            at = spread(TARGET, scores)
            largest = torch.full((n, self.heads), -math.inf).to(x)
            largest = largest.scatter_reduce(0, at, scores.detach(), "amax", include_self=False)
            scores = (scores - largest[TARGET]).exp()
            scores = scores / (torch.zeros(n, self.heads).to(x).scatter_add_(0, at, scores)[TARGET] + 1e-16)
            out = torch.zeros(h.shape, dtype=x.dtype)
            out.index_add_(0, TARGET, h[SOURCE] * scores.unsqueeze(-1))
            x = F.elu(out.view(n, -1) + self.bias)
        return self.head(x)


class Molecules(nn.Module):
    """Sums over neighbours of their features beside those of the bonds, added to what the nodes began with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN + 2, HIDDEN, bias=False)
        self.head, self.bonds = nn.Linear(5 + HIDDEN, 3), torch.rand(len(SOURCE), 2)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x)
        h = start.relu()
        for _ in range(2):
            messages = torch.cat([h[SOURCE], self.bonds.to(x)], 1)
            at = TARGET.unsqueeze(1).repeat(1, messages.shape[1])
            total = torch.zeros(len(x), messages.shape[1], dtype=x.dtype)
            h = (start + self.again(total.scatter_reduce_(0, at, messages, "sum", include_self=False))).relu()
        return self.head(torch.cat([x, h], 1))


class EdgeConvolution(nn.Module):
    """The largest over the three nearest rows, by features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, HIDDEN)
        self.edges = nn.Sequential(nn.Linear(2 * HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        near = x[torch.cdist(x, x).topk(3, largest=False)[1]]
        center = x.unsqueeze(1).expand_as(near)
        return self.head(self.edges(torch.cat([center, near - center], -1)).amax(1))


class Segments(nn.Module):
    """Sums over segments of rows that were sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        messages = F.relu(self.first(x))[SOURCE[TARGET.argsort()]]
        return self.head(torch.segment_reduce(messages, "sum", lengths=torch.bincount(TARGET, minlength=6)))


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths, between linear layers."""

    def __init__(self, kind: type[nn.RNNBase], *, in_order: bool = True, last: bool = False, **options: bool) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(5, HIDDEN), kind(HIDDEN, 6, batch_first=True, **options)
        width = 12 if options.get("bidirectional") and not last else 6
        self.second, self.head = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 3)
        self.lengths, self.in_order, self.last = torch.tensor([7, 4, 2] if in_order else [2, 7, 4]), in_order, last

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        steps = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=self.in_order)
        out, state = self.layer(steps)
        state = state[0] if isinstance(state, tuple) else state
        x = state[-1] if self.last else pad_packed_sequence(out, batch_first=True)[0]
        return self.head(self.second(x).relu())


class StateSpace(nn.Module):
    """A selective state space block: gates, a causal depthwise convolution, and a scan step by step."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.first, self.mixed = nn.Linear(5, width, bias=False), nn.Linear(width, 2 * HIDDEN, bias=False)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN, padding=3)
        self.dt = nn.Linear(HIDDEN, HIDDEN)
        self.b, self.c = (nn.Linear(HIDDEN, states, bias=False) for _ in range(2))
        self.a, self.d = nn.Parameter(torch.rand(HIDDEN, states)), nn.Parameter(torch.ones(HIDDEN))
        self.out, self.head = nn.Linear(HIDDEN, width, bias=False), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        u, gate = self.mixed(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2))
        dt, b, c = F.softplus(self.dt(u)), self.b(u), self.c(u)
        decay = torch.exp(torch.einsum("bld,dn->bldn", dt, -self.a.exp()))
        inputs = torch.einsum("bld,bln,bld->bldn", dt, b, u)
        state = torch.zeros(x.shape[0], u.shape[2], c.shape[2]).to(x)
        y = torch.empty(u.shape, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = decay[:, t] * state + inputs[:, t]
            y[:, t] = torch.einsum("bdn,bn->bd", state, c[:, t])
        return self.head(self.out((y + u * self.d) * F.silu(gate)) + x)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions by complex numbers, ``x`` being (batch, positions, heads, features)."""
    angles = torch.outer(torch.arange(x.shape[1]), 100.0 ** -torch.arange(0, 1, 2 / x.shape[3])).to(x)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3)


class Decoder(nn.Module):
    """Four heads of queries for two of keys and values, rotary positions, RMS normalization, a gated perceptron."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.k, self.v = nn.Linear(HIDDEN, 32), nn.Linear(HIDDEN, 16), nn.Linear(HIDDEN, 16)
        self.o, self.head, self.p = nn.Linear(32, HIDDEN), nn.Linear(HIDDEN, 3), dropout
        self.gate, self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.norm(x)
        q, k, v = (layer(h).view(*h.shape[:2], n, -1) for layer, n in ((self.q, 4), (self.k, 2), (self.v, 2)))
        q, k, v = (t.transpose(1, 2) for t in (rotated(q), rotated(k), v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Windows(nn.Module):
    """Attention within windows that are shifted by a roll, with a learned bias for relative positions."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(5, HIDDEN), heads
        self.qk, self.v, self.o = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.table, self.head = nn.Parameter(torch.randn(49, heads)), nn.Linear(HIDDEN, 3)
        self.register_buffer("places", torch.randint(49, (16, 16), generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, h, w, _ = x.shape
        y = torch.roll(x, (-2, -2), (1, 2)).view(b, h // 4, 4, w // 4, 4, -1)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, x.shape[-1])
        q, k = (t.view(*y.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qk(y).chunk(2, -1))
        v = self.v(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        scores = q @ k.mT + self.table[self.places.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        y = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y.view(b, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)
        return self.head((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gcn": (Gcn, NODES),
    "sage": (Sage, NODES),
    "gin": (Gin, NODES),
    "gat": (Gat, NODES),
    "gat, many heads": (lambda: Gat(8), NODES),
    "molecules": (Molecules, NODES),
    "edge convolution": (EdgeConvolution, NODES),
    "segments": (Segments, NODES),
    "lstm": (lambda: Packed(nn.LSTM), TOKENS),
    "lstm, both ways, in any order": (lambda: Packed(nn.LSTM, in_order=False, bidirectional=True), TOKENS),
    "gru": (lambda: Packed(nn.GRU, in_order=False), TOKENS),
    "gru, last state": (lambda: Packed(nn.GRU, last=True, in_order=False, bidirectional=True), TOKENS),
    "rnn": (lambda: Packed(nn.RNN), TOKENS),
    "state space": (StateSpace, TOKENS),
    "decoder": (Decoder, TOKENS),
    "decoder, dropout": (lambda: Decoder(dropout=1e-12), TOKENS),
    "windows": (Windows, PIXELS),
}
