"""What the channel graph makes of each operation: a channel goes exactly or not at all."""

import numpy as np
import pytest
import torch
from graph_cases import CASES, SUMS, WITHOUT_A_CASE
from graph_nets import Case, pinned
from killing import difference, half_removed, watched
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import RULES, Watcher
from lightning_selfcompress.quantize.convert import convert


def free_channels(net: nn.Module, channels: Channels) -> tuple[int, str]:
    """How many channels of the first layer may go, and why the first of them may not."""
    first = channels.of("first.bit_depth", 0)
    return len(np.unique(first[channels.removable()[first]])), channels.pinned.get(int(first[0]), "")


@pytest.fixture
def visited(monkeypatch):
    """The names of the operations that rules were applied to."""
    names = set()
    apply_rule = Watcher._apply_rule

    def spy(self, call):
        names.update((call.name, call.name.rstrip("_")))
        return apply_rule(self, call)

    monkeypatch.setattr(Watcher, "_apply_rule", spy)
    return names


def check(case: Case, example: Tensor, net: nn.Module) -> None:
    convert(net)

    def step() -> None:
        with case.mode():
            net(example)

    channels, watcher = watched(net, step=step)
    free, reason = free_channels(net, channels)
    assert watcher.failures == []
    assert (free, case.reason) == (case.free, case.reason if case.reason in reason else reason)
    smaller, plan = half_removed(net, channels)
    assert bool(plan) or not case.free
    assert difference(net, smaller, example) < (1e-10 if example.dtype != torch.float32 else 1e-5)


def test_every_rule_has_a_case():
    """Every operation that has a rule is tried in a network, or it is said why not."""
    tried = {key.partition(",")[0] for key in CASES}
    assert {name for name in RULES if name not in WITHOUT_A_CASE} == tried & RULES.keys()
    assert WITHOUT_A_CASE.keys() <= RULES.keys()


@pytest.mark.parametrize("key", CASES)
def test_rule(key, visited):
    """A channel goes exactly or not at all, whatever operation it passes through."""
    case = CASES[key]
    net = case.make()
    check(case, net.example(case.kind), net)
    assert key.partition(",")[0] in visited


KEEP_ZERO = {
    "relu": F.relu,
    "relu_": lambda x: F.relu(x, inplace=True),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda x: x.abs().sqrt(),
    "pow": lambda x: x**3,
    "mul by a number": lambda x: 2 * x,
    "mul": lambda x: x * x.sigmoid(),
    "mul in place": lambda x: x.mul_(2.0).mul_(x.detach().sigmoid()),
    "div": lambda x: x / (1 + x.abs()),
    "div by whole numbers": lambda x: x / torch.arange(1, 7),
    "add": lambda x: x + 2 * x.relu(),
    "sub": lambda x: x - x.relu(),
    "lerp": lambda x: torch.lerp(x, x.relu(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp, min": lambda x: x.clamp(min=0.0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 3.0),
    "softplus less its zero": lambda x: x * F.softplus(x),
    "sin": torch.sin,
    "erf": torch.erf,
    "round": torch.round,
    "neg": torch.neg,
    "cast": lambda x: x.float().double(),
    "clone": lambda x: x.clone().contiguous(),
    "detached factor": lambda x: x * x.detach().mean((2, 3), keepdim=True),
    "view_as": lambda x: x.flatten(1).view_as(x),
    "sigmoid, through a view, then zeroed": lambda x: x.sigmoid_().mul_(0.0),
    "softshrink less": lambda x: F.threshold(x, 0.1, 0.0),
    "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -8, 7).double(),
}
LOSE_ZERO = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "mask of fake_quantize": lambda x: torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(x, 0.1, 0, -8, 7)[
        1
    ].double(),
    "exp": torch.exp,
    "cos": torch.cos,
    "1 - x": lambda x: 1 - x,
    "x + 1": lambda x: x + 1,
    "x + 1, in place": lambda x: x.add_(1),
    "zero to the power of zero": lambda x: x**0,
    "scalar tensor": lambda x: x + torch.tensor(0.5),
    "clamp, min": lambda x: x.clamp(min=0.1),
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(-1.0).double()),
    "comparison": lambda x: (x >= 0).double(),
    "masked_fill": lambda x: x.masked_fill(x == 0, 3.0),
    "add of an input": lambda x: x + torch.ones(3, 1, 6, 6),
    "alternating": lambda x: x.add(x.relu(), alpha=2).cosh(),
}
NOT_FINITE = {
    "reciprocal": lambda x: 1 / x,
    "log": lambda x: x.abs().log(),
    "normalized": lambda x: x / x.norm(dim=(2, 3), keepdim=True),
}


@pytest.mark.parametrize("key", KEEP_ZERO)
def test_zero_is_kept(key):
    """What is zero where a channel is dead is known to be, so that the channel may go."""
    case = Case(KEEP_ZERO[key])
    net = case.make()
    check(case, net.example(case.kind), net)


@pytest.mark.parametrize("key", LOSE_ZERO)
def test_zero_is_lost(key):
    """A channel whose dead values would still count in a sum stays."""
    case = pinned(LOSE_ZERO[key], SUMS)
    net = case.make()
    check(case, net.example(case.kind), net)


@pytest.mark.parametrize("key", NOT_FINITE)
def test_not_finite(key):
    """A channel stays that would be infinite when dead."""
    case = pinned(NOT_FINITE[key], "is not finite where it is zero")
    net = case.make()
    check(case, net.example(case.kind), net)


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_the_numbers_of_an_operation_count(first):
    """Whether zero is kept is found out for each operation with its own numbers, positional or by keyword."""
    for number in (first, 0.5 - first):
        for shift in (lambda x, n=number: x.clamp(min=n), lambda x, n=number: torch.add(x, x.cos(), alpha=n)):
            case = Case(shift) if number == 0 else pinned(shift, SUMS)
            net = case.make()
            check(case, net.example(case.kind), net)
