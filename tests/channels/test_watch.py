"""Watching training steps of every kind: what took part is seen, and nothing is left behind."""

import copy
import io

import pytest
import torch
from graph_nets import IMAGES, Calling, X, small_net
from killing import assert_exact, converted, difference, half_removed, reason, removable_of, watched
from networks import trained_tensors
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from lightning_selfcompress.channels import watch as watch_module
from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.layers import Quantized


def is_clean(net: nn.Module, *tensors: Tensor) -> bool:
    """Whether no trace of a watcher is left on a model, or on tensors."""
    kept = [c.value for m in net.modules() if isinstance(m, Quantized) for c in m._quantized_values.values()]
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in net.modules()]
    return (
        not any(hasattr(t, "_selfcompress_layout") for t in (*net.parameters(), *net.buffers(), *kept, *tensors))
        and not any(hooks)
        and not any("_quantized_weight" in m.__dict__ for m in net.modules())
        and _get_current_dispatch_mode() is None
    )


# What took no part


class Branches(nn.Module):
    """Takes a second branch if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.taken = False

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x + self.branch(x) if self.taken else x)


def test_unseen_parameters():
    """A parameter that took no part keeps its own channels, and has those wait that it could read."""
    net = converted(Branches())
    watcher = Watcher(net)
    with watcher:
        net(X)
    assert watcher.channels().unseen == ("branch.weight", "branch.bias")
    channels = watcher.channels()
    assert removable_of(channels, "branch") == 0
    assert removable_of(channels, "stem") == 8
    assert set(channels.waiting()) == {*channels.of("stem.bit_depth", 0).tolist()}
    net.taken = True
    with watcher:
        net(X)
    channels = watcher.channels()
    assert channels.unseen == ()
    assert not channels.waiting()
    assert removable_of(channels, "stem") == 8
    assert (channels.of("stem.bit_depth", 0) == channels.of("branch.bit_depth", 0)).all()
    assert_exact(net, channels, X)


def test_watching_goes_on_from_what_is_known():
    """What was read off a step and put away goes on with the next step as if nothing had been put away."""
    net = converted(Branches())
    once = Watcher(net)
    with once:
        net(X)
    state = once.channels().state_dict()
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    earlier = Channels.from_state_dict(torch.load(file, weights_only=True))
    assert earlier.describes(net)
    assert earlier.unseen == once.channels().unseen
    again, net.taken = Watcher(net, earlier=earlier), True
    for watcher in (once, again):
        with watcher:
            net.branch(X @ net.stem.weight.T)  # what the first step said of the stem's outputs is not seen again
    assert again.channels().unseen == once.channels().unseen == ()
    assert (again.channels().group == once.channels().group).all()
    assert again.channels().pinned == once.channels().pinned
    assert not earlier.describes(converted(nn.Linear(5, 8)))


def test_a_penalty_is_no_part_taken():
    """A penalty on a parameter does not say what its module does."""
    net = converted(Branches())

    def step():
        net(X).square().mean() + sum(p.square().sum() for p in net.parameters())

    channels, _ = watched(net, step=step)
    assert channels.unseen == ("branch.weight", "branch.bias")


def test_parameters_without_entries_may_be_unseen():
    """There is nothing of them to be seen."""
    net = nn.Linear(3, 2)
    net.nothing = nn.Parameter(torch.zeros(0, 4))
    assert watched(converted(net), torch.randn(2, 3, dtype=torch.float64))[0].unseen == ()


def test_frozen_parameters_may_be_unseen():
    """A module that is frozen and unused is no obstacle."""
    net = converted(Branches())
    net.branch.requires_grad_(False)
    channels, _ = watched(net, X)
    assert channels.unseen == ()
    assert removable_of(channels, "stem") == 8


# Training steps of every kind


def test_autocast():
    """Under autocast the channels are the same."""
    net = converted(small_net())
    plain, _ = watched(net, IMAGES)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(net(IMAGES), torch.randint(5, (3,)))

    cast, watcher = watched(net, step=step)
    assert watcher.failures == []
    assert (plain.group == cast.group).all()
    assert (plain.removable() == cast.removable()).all()


def test_autocast_in_groups():
    """The depths of a transposed convolution in groups are known under autocast as well."""
    net = converted(nn.Sequential(nn.Conv2d(2, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 3, 1)))
    plain, _ = watched(net, IMAGES)
    net.float()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            net(IMAGES.float())

    cast, _ = watched(net, step=step)
    assert removable_of(plain, "1") == 3
    assert (plain.removable() == cast.removable()).all()
    assert (plain.group == cast.group).all()


@pytest.mark.parametrize("before", [False, True])
def test_compiled(before):
    """A compiled module is watched as it was written, whether it ran before or not."""
    net = converted(small_net())
    plain, _ = watched(net, IMAGES)
    compiled = torch.compile(net, backend="eager")
    if before:
        compiled(IMAGES)
    channels, watcher = watched(net, step=lambda: compiled(IMAGES))
    assert watcher.failures == []
    assert (plain.removable() == channels.removable()).all()
    compiled(IMAGES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    """Activations that are computed twice are watched once."""
    net = Calling(lambda self, x: self.last(checkpoint(self.mid, self.first(x), use_reentrant=reentrant)))
    net.mid = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    net = converted(net)
    channels, watcher = watched(net, step=lambda: net(X).sum().backward())
    assert watcher.failures == []
    assert removable_of(channels, "first") == removable_of(channels, "mid.1") == 8
    assert_exact(net, channels, X)


class Doubled(torch.autograd.Function):
    """2 x, or 1 + x."""

    @staticmethod
    def forward(ctx, x, shift):
        return x + 1 if shift else x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("shift", [False, True])
def test_custom_functions(shift):
    """Operations inside of a custom autograd function are watched."""
    net = converted(Calling(lambda self, x: self.last(Doubled.apply(self.first(x), shift))))
    channels, _ = watched(net, X)
    assert removable_of(channels, "first") == (0 if shift else 8)
    assert difference(net, half_removed(net, channels)[0], X) < 1e-10


def test_manual_optimization():
    """Backward passes and optimizer steps within a step tell nothing and are not harmed."""
    net = converted(small_net())
    plain, _ = watched(net, IMAGES)
    watched_net, y = copy.deepcopy(net), torch.randint(5, (3,))

    def step(net):
        optimizer = torch.optim.AdamW(net.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net(IMAGES), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    channels, watcher = watched(watched_net, step=lambda: step(watched_net))
    step(net)
    assert watcher.failures == []
    assert (plain.removable() == channels.removable()).all()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), watched_net.parameters(), strict=True))


def test_closures():
    """What an optimizer's closure does is watched, what the optimizer itself does is not."""
    net = converted(small_net())
    plain, _ = watched(net, IMAGES)
    y = torch.randint(5, (3,))
    optimizer = torch.optim.LBFGS([p for p in net.parameters() if p.dim() > 1], max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES), y)
        loss.backward()
        return loss

    channels, watcher = watched(net, step=lambda: optimizer.step(closure))
    assert watcher.failures == []
    assert channels.unseen == ()
    assert (plain.removable() == channels.removable()).all()


# What is left behind


def test_nothing_is_changed():
    """Outputs, gradients, statistics and random numbers are the same to the bit, watched or not."""
    net = converted(nn.Sequential(small_net()[:3], nn.Dropout(0.5), *small_net()[3:]))
    seen = copy.deepcopy(net)
    results = []
    for one in (net, seen):
        torch.manual_seed(3)
        watcher = Watcher(one)
        if one is seen:
            with watcher:
                out = one(IMAGES)
                out.square().sum().backward()
        else:
            out = one(IMAGES)
            out.square().sum().backward()
        results.append([out, torch.get_rng_state(), *(t.grad for t in trained_tensors(one).values()), *one.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_left_behind():
    """After a watched step there is no trace of it on the model or on tensors that live on."""
    net = converted(small_net())
    kept = []
    net[2].register_forward_hook(lambda module, args, out: kept.append(out))
    hooks = dict(net[2]._forward_hooks)
    with Watcher(net):
        out = net(IMAGES)
    assert net[2]._forward_hooks == hooks
    net[2]._forward_hooks.clear()
    assert is_clean(net, out, *kept)


def test_nothing_is_left_behind_by_an_exception():
    """An exception in the step ends the watching as well."""
    net = converted(small_net())

    def fail():
        with torch.no_grad(), Watcher(net):
            net(IMAGES)
            raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        fail()
    assert is_clean(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step(lambda: net(IMAGES).sum())
    assert is_clean(net)


def test_a_failing_rule(monkeypatch):
    """A rule that raises pins what it was about, is told of, and leaves the step alone."""

    def fail(call):
        raise ValueError("a mistake")

    net = converted(small_net())
    expected = net(IMAGES)
    monkeypatch.setitem(watch_module.RULES, "native_batch_norm", fail)
    watcher = Watcher(net)
    with watcher:
        assert torch.equal(net(IMAGES), expected)
    assert watcher.failures == ["aten.native_batch_norm.default: ValueError: a mistake"]
    channels = watcher.channels()
    assert removable_of(channels, "0") == 0
    assert reason(channels, "0") == watcher.failures[0]
    assert removable_of(channels, "3") == 4


def test_an_operation_without_a_rule():
    """Where an operation is unknown, channels stay and the operation is named."""
    net = converted(Calling(lambda self, x: self.last(torch.linalg.qr(self.first(x)).R)))
    channels, watcher = watched(net, X)
    assert removable_of(channels, "first") == 0
    assert reason(channels, "first").endswith("has no rule")
    assert watcher.without_rule


def test_channels_as_python_values():
    """A channel stays that a Python value was made from."""
    net = converted(Calling(lambda self, x: self.last(x if torch.equal(x := self.first(x), 2 * x) else -x)))
    channels, watcher = watched(net, X)
    assert watcher.failures == []
    assert reason(channels, "first") == "equal has no rule"
