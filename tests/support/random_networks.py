"""Random networks, made of operations of which some are hard to remove channels through.

Sizes are read from tensors wherever they depend on the number of channels: those written as numbers are seen by no
operation, and show in a dry run alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

BATCH = 3
Choose = Callable[[Sequence[Any]], Any]  # picks one of several
Made = tuple[Callable[..., Tensor], list[Any], list[int]]  # a function, its layers, and the values that it reads


class Step(nn.Module):
    """A function of layers and of earlier values, ``function(*layers, *values)``."""

    def __init__(self, name: str, made: Made) -> None:
        super().__init__()
        self.name = name
        self.function, self.layers, self.inputs = made[0], nn.ModuleList(made[1]), made[2]

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.function(*self.layers, *(values[i] for i in self.inputs))

    def extra_repr(self) -> str:
        return f"{self.name} of {self.inputs}"


class RandomNetwork(nn.Module):
    """Steps, each of which reads values that are there already; value 0 is the input.

    Args:
        example: An input.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.steps, self.heads = nn.ModuleList(), nn.ModuleList()

    def values(self, x: Tensor) -> list[Tensor]:
        """All values, those written to in place as they are in the end."""
        values = [x.clone()]
        for step in self.steps:
            values.append(step(values))
        return values

    def forward(self, x: Tensor) -> list[Tensor]:
        values = self.values(x)
        return [head(values) for head in self.heads]


class Builder:
    """Puts a network together, step by step; a step that torch refuses is left out.

    Args:
        choose: Picks one of several.
    """

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        torch.manual_seed(choose(range(1000)))
        space = choose([(), (6,), (8,), (4, 4), (6, 4)])
        self.network = RandomNetwork(torch.randn(BATCH, choose([2, 3, 4]), *space).double())
        self.values = [self.network.example]

    def build(self) -> RandomNetwork:
        """The network: a third of them with operations that pin."""
        hard = self.choose(range(100)) < 35
        self.add(mix, at=0)
        for _ in range(self.choose(range(2, 14))):
            self.add(self.choose(HARD if hard and self.choose(range(4)) == 0 else EASY))
        last = len(self.values) - 1
        for at in {last, self.choose(range(last + 1))}:
            self.network.heads.append(Step("head", self.head(at)).double())
        return self.network

    def add(self, operation: Callable[["Builder", int], Made], at: int | None = None) -> None:
        """Adds a step that reads one of the last values."""
        at = max(0, len(self.values) - 1 - self.choose([0, 0, 0, 0, 1, 2, 3])) if at is None else at
        steps = self.network.steps
        try:
            steps.append(Step(operation.__name__, operation(self, at)).double())
            values = [value.detach() for value in self.network.values(self.network.example)]
            new = values[-1]
            if not 1 < new[0].numel() <= 1000 or new.dim() not in (2, 3, 4) or not new.isfinite().all():
                raise ValueError("Expected values to go on with.")
            self.values = values
        except (RuntimeError, ValueError, IndexError, TypeError):
            del steps[len(self.values) - 1 :]

    def head(self, at: int) -> Made:
        """An output: a linear layer over a value, flattened or averaged."""
        value = self.values[at]
        if value.dim() > 2 and self.choose([True, False]):
            return (lambda layer, x: layer(x.flatten(2).mean(2))), [nn.Linear(value.shape[1], 3)], [at]
        return (lambda layer, x: layer(x.flatten(1))), [nn.Linear(value[0].numel(), 3)], [at]

    def width(self, at: int) -> int:
        """How many channels a value has."""
        return self.values[at].shape[1]

    def has_pairs(self, at: int) -> bool:
        """Whether it is clear that a view to (..., 2) means pairs: not if there might be two channels in all."""
        return self.width(at) % 2 == 0 and self.width(at) > 4 and min(v.shape[1] for v in self.values) > 2

    def conv(self, at: int, out: int, *, transposed: bool = False, **options: Any) -> nn.Module:
        """A convolution, or a linear layer over values that have no space."""
        value, bias = self.values[at], self.choose([True, False])
        if value.dim() == 2:
            return nn.Linear(value.shape[1], out, bias=bias)
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
        return kinds[value.dim() - 3](value.shape[1], out, **{"kernel_size": 1, "bias": bias, **options})

    def other(self, at: int, *, only_space: bool = False) -> int:
        """Another value of the same shape; with ``only_space`` its width may be different."""
        shape = self.values[at].shape
        same = [
            i
            for i, t in enumerate(self.values)
            if t.shape == shape or (only_space and t.shape[2:] == shape[2:] and t.dim() == len(shape))
        ]
        return self.choose([i for i in same if i != at] or [at])


def plain(function: Callable[[Tensor], Tensor], name: str) -> Callable[[Builder, int], Made]:
    """An operation of one value and no layers."""

    def operation(b: Builder, at: int) -> Made:
        return function, [], [at]

    operation.__name__ = name
    return operation


def mix(b: Builder, at: int) -> Made:
    kernel = b.choose([1, 3, 3])
    stride = b.choose([1, 1, 2])
    layer = b.conv(at, b.choose([4, 6, 8, 8, 12]), kernel_size=kernel, padding=kernel // 2, stride=stride)
    return (lambda layer, x: layer(x)), [layer], [at]


def grouped(b: Builder, at: int) -> Made:
    width = b.width(at)
    groups = b.choose([g for g in (2, 3, 4) if width % g == 0] or [1])
    layer = b.conv(
        at, groups * b.choose([3, 4]), kernel_size=3, padding=1, groups=groups, transposed=b.choose([0, 0, 1])
    )
    return (lambda layer, x: layer(x)), [layer], [at]


def depthwise(b: Builder, at: int) -> Made:
    width, transposed = b.width(at), b.choose([False, False, True])
    layer = b.conv(at, width * b.choose([1, 1, 2]), kernel_size=3, padding=1, groups=width, transposed=transposed)
    return (lambda layer, x: layer(x)), [layer], [at]


def upconv(b: Builder, at: int) -> Made:
    layer = b.conv(at, b.choose([4, 6]), kernel_size=2, stride=2, transposed=True)
    return (lambda layer, x: layer(x)), [layer], [at]


def linear_over_channels(b: Builder, at: int) -> Made:
    layer = nn.Linear(b.width(at), b.choose([4, 6, 8]), bias=b.choose([True, False]))
    return (lambda layer, x: layer(x.movedim(1, -1)).movedim(-1, 1)), [layer], [at]


def linear_over_space(b: Builder, at: int) -> Made:
    layer = nn.Linear(b.values[at].shape[-1], b.choose([4, 6, 8]), bias=b.choose([True, False]))
    return (lambda layer, x: layer(x)), [layer], [at]


def einsum(b: Builder, at: int) -> Made:
    layer = nn.Linear(b.width(at), b.choose([4, 6]), bias=False)
    return (lambda layer, x: torch.einsum("bc...,dc->bd...", x, layer.weight)), [layer], [at]


def batch_norm(b: Builder, at: int) -> Made:
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[b.values[at].dim() - 2]
    return (lambda layer, x: layer(x)), [kind(b.width(at), affine=b.choose([True, True, False]))], [at]


def group_norm(b: Builder, at: int) -> Made:
    width = b.width(at)
    groups = b.choose([g for g in (1, 2, 4, width) if width % g == 0])
    return (lambda layer, x: layer(x)), [nn.GroupNorm(groups, width, affine=b.choose([True, True, False]))], [at]


def instance_norm(b: Builder, at: int) -> Made:
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d)[b.values[at].dim() - 3]
    options = {"affine": b.choose([True, False]), "track_running_stats": b.choose([True, False])}
    return (lambda layer, x: layer(x)), [kind(b.width(at), **options)], [at]


def prelu(b: Builder, at: int) -> Made:
    return (lambda layer, x: layer(x)), [nn.PReLU(b.choose([1, b.width(at)]))], [at]


def scaled(b: Builder, at: int) -> Made:
    scale = nn.ParameterList([torch.randn(b.width(at), *[1] * (b.values[at].dim() - 2))])
    if b.choose([True, False]):
        return (lambda scale, x: x + scale[0]), [scale], [at]
    return (lambda scale, x: x * scale[0]), [scale], [at]


def dropped(b: Builder, at: int) -> Made:
    kind = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)[b.values[at].dim() - 2]
    return (lambda layer, x: layer(x)), [b.choose([nn.Dropout, kind])(0.3)], [at]


def added(b: Builder, at: int) -> Made:
    return torch.add, [], [at, b.other(at)]


def multiplied(b: Builder, at: int) -> Made:
    return torch.mul, [], [at, b.other(at)]


def added_in_place(b: Builder, at: int) -> Made:
    return (lambda x, y: x.add_(y)), [], [at, b.other(at)]


def joined(b: Builder, at: int) -> Made:
    return (lambda *xs: torch.cat(xs, 1)), [], [at, b.other(at, only_space=True)]


def joined_in_space(b: Builder, at: int) -> Made:
    return (lambda *xs: torch.cat(xs, -1)), [], [at, b.other(at)]


def stacked(b: Builder, at: int) -> Made:
    return (lambda *xs: torch.stack(xs, 1).amax(1)), [], [at, b.other(at)]


def squeeze_and_excite(b: Builder, at: int) -> Made:
    width = b.width(at)
    layers = [nn.Linear(width, 4), nn.Linear(4, width)]

    def function(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        gate = other(one(x.flatten(2).mean(2)).relu()).sigmoid()
        return x * gate.view(*gate.shape, *[1] * (x.dim() - 2))

    return function, layers, [at]


def gated(b: Builder, at: int) -> Made:
    return (lambda x, y: x * y.sigmoid()), [], [at, b.other(at)]


def projected_residual(b: Builder, at: int) -> Made:
    other = b.other(at, only_space=True)
    return (lambda layer, x, y: x + layer(y)), [b.conv(other, b.width(at))], [at, other]


def attended(b: Builder, at: int) -> Made:
    q, k, v = (b.conv(at, n) for n in (4, 4, b.width(at)))

    def function(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> Tensor:
        weights = (q(x).flatten(2).transpose(1, 2) @ k(x).flatten(2)).softmax(-1)
        return x + (v(x).flatten(2) @ weights.transpose(1, 2)).view(x.shape)

    return function, [q, k, v], [at]


def shared(b: Builder, at: int) -> Made:
    """A layer of an earlier step once more."""
    fitting = [
        layer
        for step in b.network.steps
        for layer in step.layers
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    ]
    return (lambda layer, x: layer(x)), [b.choose(fitting)], [at]


def scaled_weight(b: Builder, at: int) -> Made:
    layer = nn.Linear(b.width(at), b.choose([4, 6]))
    norm = b.choose([lambda w: w.norm(), lambda w: w.norm(dim=1, keepdim=True), lambda w: 2.0])
    return (lambda layer, x: F.linear(x, layer.weight / (0.1 + norm(layer.weight)), layer.bias)), [layer], [at]


def shuffled(b: Builder, at: int) -> Made:
    groups = b.choose([g for g in (2, 3) if b.width(at) % g == 0 and b.width(at) // g > g])

    def function(x: Tensor) -> Tensor:
        split = x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        return split.transpose(1, 2).reshape(x.shape)

    return function, [], [at]


def halved(b: Builder, at: int) -> Made:
    half = b.choose([lambda x: x[:, : x.shape[1] // 2], lambda x: x[:, x.shape[1] // 2 :]])
    return half, [], [at] if b.width(at) % 2 == 0 else []


def exchanged(b: Builder, at: int) -> Made:
    def function(x: Tensor) -> Tensor:
        one, other = x.split(x.shape[1] // 2, 1)
        return torch.cat([other, one.relu()], 1)

    return function, [], [at] if b.width(at) % 2 == 0 else []


def split_in_three(b: Builder, at: int) -> Made:
    def function(x: Tensor) -> Tensor:
        one, two, three = x.chunk(3, 1)
        return one * two + three

    return function, [], [at] if b.width(at) % 3 == 0 else []


def pairs(b: Builder, at: int) -> Made:
    reduce = b.choose([lambda x: x.amax(2), lambda x: x.sum(2), lambda x: x[:, :, 0]])
    return (lambda x: reduce(x.unflatten(1, (-1, 2)))), [], [at] if b.has_pairs(at) else []


def unfolded(b: Builder, at: int) -> Made:
    """Features of no space become maps of a few pixels."""
    fits = b.values[at].dim() == 2 and b.has_pairs(at)
    return (lambda x: x.unflatten(1, (-1, 2))), [], [at] if fits else []


def space_unfolded(b: Builder, at: int) -> Made:
    fits = b.values[at].dim() == 3 and b.values[at].shape[2] > 4
    return (lambda x: x.unflatten(2, (-1, 2))), [], [at] if fits else []


def flattened(b: Builder, at: int) -> Made:
    layer = nn.Linear(b.values[at][0].numel(), b.choose([6, 8, 12]))
    return (lambda layer, x: layer(x.flatten(1))), [layer], [at]


def one_channel_each(b: Builder, at: int) -> Made:
    """Every channel is an image of its own."""
    kind = (nn.Conv1d, nn.Conv2d)[b.values[at].dim() - 3]
    layer = kind(1, 1, 3, padding=1, bias=b.choose([True, False]))
    return (lambda layer, x: layer(x.flatten(0, 1).unsqueeze(1)).view(x.shape)), [layer], [at]


def square_attention(b: Builder, at: int) -> Made:
    """Attention over channels: they are positions, and summed over with weights."""
    return (lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(x.shape)), [], [at]


def written(b: Builder, at: int) -> Made:
    """Writes through views."""

    def half(x: Tensor) -> None:
        x[:, : x.shape[1] // 2] = x[:, x.shape[1] // 2 :]

    def half_not_zero(x: Tensor) -> None:
        x[:, : x.shape[1] // 2].sigmoid_()

    def border(x: Tensor) -> None:
        x[..., 0] = 1.0

    def flat(x: Tensor) -> None:
        x.view(x.shape[0], -1).cos_()

    def flat_scaled(x: Tensor) -> None:
        x.view(x.shape[0], -1).mul_(0.5)

    def turned(x: Tensor) -> None:
        x.transpose(1, -1).relu_()

    write = b.choose([half, half_not_zero, border, flat, flat_scaled, turned])

    def function(x: Tensor) -> Tensor:
        x = x.clone()
        write(x)
        return x

    return function, [], [at] if b.width(at) % 2 == 0 and b.values[at].dim() > 2 else []


def mean_within_groups(b: Builder, at: int) -> Made:
    return (lambda x: x.unflatten(1, (2, -1)).mean(2)), [], [at] if b.has_pairs(at) else []


def layer_norm(b: Builder, at: int) -> Made:
    layer = nn.LayerNorm(b.width(at))
    return (lambda layer, x: layer(x.movedim(1, -1)).movedim(-1, 1)), [layer], [at]


def layer_norm_of_space(b: Builder, at: int) -> Made:
    return (lambda layer, x: layer(x)), [nn.LayerNorm(b.values[at].shape[2:], bias=b.choose([True, False]))], [at]


def with_constant(b: Builder, at: int) -> Made:
    number = torch.randn(b.values[at].shape[1:]).double()
    return (lambda x: x + number), [], [at]


def numbers(b: Builder, size: int, count: int) -> Tensor:
    """As many numbers below a size, some of them twice."""
    return torch.tensor([b.choose(range(size)) for _ in range(count)])


def along(numbers: Tensor, dim: int, x: Tensor) -> Tensor:
    """Numbers along one dimension of a tensor, the same at all positions along the others."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return numbers.view(shape).expand(*x.shape[:dim], len(numbers), *x.shape[dim + 1 :])


def row_dim(b: Builder, at: int) -> int:
    """A dimension without channels: that of the batch, or the last one."""
    return 0 if b.values[at].dim() == 2 else b.choose([0, b.values[at].dim() - 1])


def rows_picked(b: Builder, at: int) -> Made:
    dim = row_dim(b, at)
    n = numbers(b, b.values[at].shape[dim], b.values[at].shape[dim])
    pick = b.choose(
        [
            lambda x: x.index_select(dim, n),
            lambda x: x.gather(dim, along(n, dim, x)),
            lambda x: torch.take_along_dim(x, n.view([-1 if d == dim else 1 for d in range(x.dim())]), dim),
            lambda x: x.movedim(dim, 0)[n].movedim(0, dim),
            lambda x: x.gather(dim, x.argsort(dim)),
        ]
    )
    return pick, [], [at]


def messages(b: Builder, at: int) -> Made:
    """Rows that are gathered, and added up where other numbers say."""
    dim, other = row_dim(b, at), b.other(at)
    size = b.values[at].shape[dim]
    source, target = numbers(b, size, size + 2), numbers(b, size, size + 2)
    start = b.choose(
        [
            *(lambda x, y: torch.zeros_like(x), lambda x, y: x.new_zeros(x.shape)),
            *(lambda x, y: torch.zeros(x.shape).double(), lambda x, y: torch.full(x.shape, 0.5).double()),
            lambda x, y: y.clone(),
        ]
    )

    def put(out: Tensor, m: Tensor) -> Tensor:
        return out.movedim(dim, 0).index_put((target,), m.movedim(dim, 0), accumulate=True).movedim(0, dim)

    add = b.choose(
        [
            lambda out, m: out.index_add_(dim, target, m),
            lambda out, m: out.index_add(dim, target, m, alpha=0.5),
            lambda out, m: out.scatter_add_(dim, along(target, dim, m), m),
            put,
            *(
                lambda out, m, how=how: out.scatter_reduce(dim, along(target, dim, m), m, how, include_self=False)
                for how in ("sum", "mean", "amax", "amin")
            ),
            lambda out, m: out.index_reduce(dim, target, m.detach(), "mean", include_self=False),
        ]
    )
    return (lambda x, y: add(start(x, y), x.index_select(dim, source))), [], [at, other]


def under_a_mask(b: Builder, at: int) -> Made:
    dim, other = row_dim(b, at), b.other(at)
    value = b.choose([0.0, 0.0, 1.0])
    mask = torch.arange(b.values[at].shape[dim]) % 2 == b.choose([0, 1])

    def spread(x: Tensor) -> Tensor:
        return mask.view([-1 if d == dim else 1 for d in range(x.dim())])

    def assigned(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x.movedim(dim, 0)[mask] = value
        return x

    def assigned_from(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x.movedim(dim, 0)[mask] = y.movedim(dim, 0)[mask]
        return x

    def positive(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[y > 0] = value
        return x

    function = b.choose(
        [
            assigned,
            assigned_from,
            positive,
            lambda x, y: torch.where(spread(x), x, y),
            lambda x, y: torch.where(spread(x), x, value),
            lambda x, y: torch.where(y > 0, x, torch.full(y.shape, value).to(y)),
            lambda x, y: x.masked_fill(spread(x), value),
            lambda x, y: x.movedim(1, -1).masked_scatter(spread(x).movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1),
        ]
    )
    return function, [], [at, other]


def written_in_turn(b: Builder, at: int) -> Made:
    """A state that starts at zero, and a new tensor that takes each of its values."""
    start = b.choose([torch.zeros, torch.zeros, torch.ones])
    make = b.choose([torch.zeros, torch.empty])

    def function(x: Tensor) -> Tensor:
        state, out = start(x.shape[:-1]).to(x), make(x.shape, dtype=x.dtype)
        for i in range(x.shape[-1]):
            state = 0.5 * state + x[..., i]
            out[..., i] = state
        return out

    return function, [], [at] if b.values[at].dim() > 2 else []


def made_anew(b: Builder, at: int) -> Made:
    """A new tensor in the shape of a value, to which values are written, added or joined."""
    one = b.other(at)

    def halves(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], 2 * x.shape[1], *x.shape[2:])
        out[:, : x.shape[1]] = x
        out[:, x.shape[1] :].copy_(y)
        return out

    def borders(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)
        out[..., 1:] = x
        return out

    def flat(x: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros(x.shape).double()
        out.view(x.shape[0], -1).add_(y.flatten(1))
        return out + x

    def both(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        return (x + out) * (y.sin() + out)

    function = b.choose(
        [
            halves,
            borders,
            flat,
            both,
            lambda x, y: torch.maximum(x, torch.zeros(x.shape).double()),
            lambda x, y: x + torch.ones(x.shape[1], *[1] * (x.dim() - 2)).double() * y,
            lambda x, y: x * torch.full(x.shape[1:], 0.5).double() + torch.zeros(()),
        ]
    )
    return function, [], [at, one]


def folded(b: Builder, at: int) -> Made:
    stride = b.choose([1, 2])
    window = b.choose([nn.Identity(), nn.ReLU()])
    return (
        (lambda window, x: F.fold(window(F.unfold(x, 2, stride=stride)), x.shape[-2:], 2, stride=stride)),
        [window],
        [at],
    )


def complex_pairs(b: Builder, at: int) -> Made:
    """Pairs of positions as complex numbers, turned by an angle for each."""
    angles = torch.randn(max(b.values[at].shape[-1] // 2, 1)).double()
    turn = torch.polar(torch.ones_like(angles), angles)

    def function(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(z.conj() if x.dim() == 3 else z).flatten(-2)

    return function, [], [at] if b.values[at].dim() > 2 else []


def fused_attention(b: Builder, at: int) -> Made:
    """Over positions, by torch's own operation, with a mask or with dropout so rare that it never happens."""
    q, k, v = (b.conv(at, n) for n in (4, 4, b.width(at)))
    dropout, scale, causal = b.choose([0.0, 1e-12]), b.choose([None, 0.3]), b.choose([True, False])

    def function(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).mT.unsqueeze(1) for layer in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=causal)
        return out.squeeze(1).mT.unflatten(-1, x.shape[2:])

    return function, [q, k, v], [at]


def attended_in_heads(b: Builder, at: int) -> Made:
    """Two heads of queries for each head of keys and values."""
    heads, layers = b.choose([1, 2]), [b.conv(at, n) for n in (32, 16, 16)]
    repeat = b.choose(
        [
            lambda x: x.repeat_interleave(2, 1),
            lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
        ]
    )

    def function(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).flatten(2).unflatten(1, (h, -1)).mT
            for layer, h in zip((q, k, v), (2 * heads, heads, heads), strict=True)
        )
        weights = (q @ repeat(k).mT).softmax(-1)
        return (weights @ repeat(v)).mT.flatten(1, 2).unflatten(-1, x.shape[2:])

    return function, layers, [at] if b.values[at].dim() > 2 else []


def packed(b: Builder, at: int) -> Made:
    """Positions as steps of sequences of different lengths, with or without a recurrent layer."""
    length, width = b.values[at].shape[-1], b.width(at)
    lengths = torch.tensor([length, max(length - 2, 1), 1])
    layer = b.choose([nn.Identity(), nn.GRU(width, 5), nn.LSTM(width, 4, bidirectional=True)])

    def function(layer: nn.Module, x: Tensor) -> Tensor:
        sequence = pack_padded_sequence(x.mT, lengths, batch_first=True)
        sequence = sequence if isinstance(layer, nn.Identity) else layer(sequence)[0]
        return pad_packed_sequence(sequence, batch_first=True)[0].mT

    return function, [layer], [at] if b.values[at].dim() == 3 else []


def handed_on(b: Builder, at: int) -> Made:
    """Two recurrent layers over the positions, of which one starts from the state that the other ends with."""
    kind, width = b.choose([nn.GRU, nn.LSTM, nn.RNN]), b.width(at)
    depth = b.choose([1, 2])
    layers = [kind(width, 4, depth, batch_first=True) for _ in range(2)]
    change = b.choose([lambda t: t, torch.relu, torch.sigmoid, lambda t: t.flip(0)])

    def function(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        state = one(x.mT)[1]
        state = tuple(change(t) for t in state) if isinstance(state, tuple) else change(state)
        return other(x.mT, state)[0].mT

    return function, layers, [at] if b.values[at].dim() == 3 else []


def own_cell(b: Builder, at: int) -> Made:
    """A recurrent cell of linear layers, over the positions."""
    width = b.choose([4, 6])
    layers = [nn.Linear(b.width(at), width), nn.Linear(width, width, bias=False)]
    act = b.choose([torch.tanh, torch.tanh, torch.sigmoid])

    def function(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        inputs = one(x.mT)
        state, states = torch.zeros(x.shape[0], inputs.shape[-1]).to(x), []
        for i in range(x.shape[2]):
            state = act(inputs[:, i] + other(state))
            states.append(state)
        return torch.stack(states, -1)

    return function, layers, [at] if b.values[at].dim() == 3 else []


def segments(b: Builder, at: int) -> Made:
    how, initial = b.choose(["sum", "mean", "max", "min"]), b.choose([0, 0, None])
    lengths = torch.tensor(b.choose([[1, 0, 2], [1, 1, 1], [3, 0, 0]]))
    lengths = lengths if how == "sum" or initial == 0 else torch.tensor([1, 1, 1])
    return (lambda x: torch.segment_reduce(x.contiguous(), how, lengths=lengths, initial=initial)), [], [at]


def causal(b: Builder, at: int) -> Made:
    """A depthwise convolution that sees earlier positions alone."""
    width = b.width(at)
    layer = nn.Conv1d(width, width, 3, groups=width, padding=2)
    return (lambda layer, x: layer(x)[..., : x.shape[-1]]), [layer], [at]


def two_ones(x: Tensor) -> Tensor:
    """Two channels of ones; a new tensor of that width would have it in the code, which a dry run alone finds."""
    return torch.tensor([1.0, 1.0]).view(1, 2, *[1] * (x.dim() - 2)).expand(x.shape[0], 2, *x.shape[2:]).to(x)


EASY = [
    *[rows_picked, messages, under_a_mask, made_anew] * 2,
    *(written_in_turn, folded, complex_pairs, fused_attention, attended_in_heads, packed, segments, causal),
    *(handed_on, own_cell),
    *[mix] * 6,
    *[batch_norm, grouped, depthwise, added, joined, linear_over_channels, projected_residual] * 2,
    *(upconv, linear_over_space, einsum, group_norm, instance_norm, prelu, scaled, dropped, multiplied),
    *(added_in_place, joined_in_space, stacked, squeeze_and_excite, gated, attended, shared, scaled_weight),
    *(
        shuffled,
        halved,
        exchanged,
        split_in_three,
        pairs,
        unfolded,
        space_unfolded,
        flattened,
        one_channel_each,
        written,
    ),
    plain(F.relu, "relu"),
    plain(F.gelu, "gelu"),
    plain(lambda x: x.relu_(), "relu in place"),
    plain(lambda x: x.mul_(0.7), "scaled in place"),
    plain(lambda x: torch.where(x > 0, x, 0.1 * x), "where"),
    plain(lambda x: F.glu(x, 1), "glu"),
    plain(lambda x: (F.max_pool1d if x.dim() == 3 else F.max_pool2d)(x, 2), "max pool"),
    plain(lambda x: (F.avg_pool1d if x.dim() == 3 else F.avg_pool2d)(x, 2), "average pool"),
    plain(lambda x: x.mean(-1, keepdim=True).expand_as(x) + x, "mean, expanded"),
    plain(lambda x: F.interpolate(x, scale_factor=2), "upsampled"),
    plain(lambda x: F.pixel_shuffle(x, 2), "pixel shuffle"),
    plain(lambda x: F.pixel_unshuffle(x, 2), "pixel unshuffle"),
    plain(lambda x: F.pad(x, (1, 0)), "padded"),
    plain(lambda x: x.flatten(2), "space flattened"),
    plain(lambda x: x.flatten(0, 1).relu().unflatten(0, (x.shape[0], -1)), "batch and channels merged"),
    plain(lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)), "repeated"),
    plain(lambda x: x.repeat_interleave(2, 1), "interleaved"),
    plain(lambda x: x.flip(-1), "space flipped"),
    plain(lambda x: x.cumsum(-1), "running sum"),
    plain(lambda x: x * x.softmax(-1), "softmax of space"),
    plain(lambda x: x.sum(1, keepdim=True) * x, "summed over channels"),
    plain(lambda x: F.unfold(x, 2), "windows"),
    plain(lambda x: x * (x.std(-1, keepdim=True)), "deviation"),
    plain(lambda x: x[..., : x.shape[-1] // 2], "first positions"),
    plain(lambda x: x.roll(1, -1), "positions rolled"),
    plain(lambda x: x.unfold(-1, 2, 1).amax(-1), "sliding maximum"),
    plain(lambda x: x.cumprod(-1), "running product"),
    plain(lambda x: x.cummax(-1)[0], "running maximum"),
    plain(lambda x: x.median(-1, keepdim=True)[0] + x, "median"),
    plain(lambda x: x / torch.arange(1, x.shape[-1] + 1), "divided by the number of the position"),
    plain(lambda x: F.normalize(x, dim=1), "normalized"),
    plain(lambda x: torch.fft.irfft(torch.fft.rfft(x), x.shape[-1]), "transformed and back"),
    plain(lambda x: x.tril(), "triangle"),
    plain(lambda x: F.pad(x, (1, 1) * (x.dim() - 2), mode="circular"), "padded with the other end"),
    plain(lambda x: torch.cdist(x.mT, x.mT), "distances"),
    plain(lambda x: torch.eye(x.shape[0]).to(x).to_sparse() @ x if x.dim() == 2 else x, "sparse"),
]
HARD = [
    plain(lambda x: x.index_select(1, torch.arange(x.shape[1] - 1)), "all but one"),
    plain(lambda x: x.index_add(1, torch.arange(x.shape[1]) % 3, x), "added to three channels"),
    plain(lambda x: x.scatter(1, x.argmax(1, keepdim=True), 0.0), "largest channel"),
    plain(lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 1, 1.0), "ones at a position"),
    plain(lambda x: torch.fft.rfft(x, dim=1).abs(), "channels transformed"),
    plain(lambda x: x.unfold(1, 2, 1).sum(-1), "neighbours summed"),
    plain(lambda x: x + torch.linspace(0, 1, x.shape[1]).double().view(-1, *[1] * (x.dim() - 2)), "a ramp"),
    plain(lambda x: x.masked_select(x > 0).sum() * x, "sum of the positive"),
    plain(lambda x: torch.view_as_complex(x.movedim(1, -1).unflatten(-1, (-1, 2))).abs().movedim(-1, 1), "pairs"),
    plain(lambda x: x.new_zeros(x.shape).normal_(generator=torch.Generator().manual_seed(0)) * 0.0 + x, "noise"),
    *(layer_norm, layer_norm_of_space, with_constant, square_attention, mean_within_groups),
    plain(torch.sigmoid, "sigmoid"),
    plain(lambda x: 1 - x, "1 - x"),
    plain(lambda x: x.add_(1), "1 added in place"),
    plain(F.softplus, "softplus"),
    plain(lambda x: x.softmax(1), "softmax of channels"),
    plain(lambda x: x[:, 1:3], "slice"),
    plain(lambda x: x[:, ::2], "every second"),
    plain(lambda x: x[:, [0, 2, 3]], "picked"),
    plain(lambda x: x * x[:, 1].unsqueeze(1), "selected"),
    plain(lambda x: x.flip(1), "flipped"),
    plain(lambda x: x + x.flip(1), "flipped and added"),
    plain(lambda x: x.roll(1, 1), "rolled"),
    plain(lambda x: x * x.mean(1, keepdim=True), "mean of channels"),
    plain(lambda x: x * x.sigmoid().sum(1, keepdim=True), "sum of what is not zero"),
    plain(lambda x: x / (1 + x.norm(dim=1, keepdim=True)), "norm of channels"),
    plain(lambda x: x * x.amax(1, keepdim=True), "maximum of channels"),
    plain(lambda x: x.cumsum(1), "running sum of channels"),
    plain(lambda x: x.sort(1)[0], "sorted channels"),
    plain(lambda x: x - x.mean(), "mean of everything"),
    plain(lambda x: F.pad(x, (1, 0), value=1.0), "padded with ones"),
    plain(lambda x: F.pad(x, (0,) * (2 * x.dim() - 4) + (1, 2)), "channels padded"),
    plain(lambda x: torch.cat([x, two_ones(x)], 1), "constant channels"),
    plain(lambda x: x + torch.zeros(x.shape).double(), "zeros added"),
    plain(lambda x: torch.stack(x.unbind(1), 1), "unbound"),
    plain(lambda x: x.transpose(1, 2), "channels for positions"),
    plain(lambda x: x.flatten(1).cos().view(x.shape), "cosine"),
]


@st.composite
def networks(draw: st.DrawFn) -> RandomNetwork:
    """Random networks in float64; ``network.example`` is an input."""
    return Builder(lambda options: draw(st.sampled_from(options))).build()
