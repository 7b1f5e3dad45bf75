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


EASY = [
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
]
HARD = [
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
    plain(lambda x: torch.cat([x, x.new_ones(x.shape[0], 2, *x.shape[2:])], 1), "constant channels"),
    plain(lambda x: x + torch.zeros(x.shape).double(), "zeros added"),
    plain(lambda x: torch.stack(x.unbind(1), 1), "unbound"),
    plain(lambda x: x.transpose(1, 2), "channels for positions"),
    plain(lambda x: x.flatten(1).cos().view(x.shape), "cosine"),
]


@st.composite
def networks(draw: st.DrawFn) -> RandomNetwork:
    """Random networks in float64; ``network.example`` is an input."""
    return Builder(lambda options: draw(st.sampled_from(options))).build()
