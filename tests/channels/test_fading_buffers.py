"""Constants in buffers: the shift of a frozen normalization fades with the channel that it belongs to."""

import pytest
import torch
from killing import assert_exact, converted, half_removed, reason, removable_of, watched
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher

WIDTH, IMAGES = 6, torch.randn(4, 2, 5, 5, dtype=torch.float64)


class Buffers(nn.Module):
    """Buffers of one value per channel, and what is computed with them."""

    def __init__(self, compute, shape=(WIDTH,), names=("weight", "bias", "running_mean", "running_var")):
        super().__init__()
        self.compute = compute
        for name in names:
            self.register_buffer(name, torch.rand(shape, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return self.compute(self, x)


def torchvision(n, x):
    w, b, var, mean = (t.reshape(1, -1, 1, 1) for t in (n.weight, n.bias, n.running_var, n.running_mean))
    scale = w * (var + 1e-5).rsqrt()
    return x * scale + (b - mean * scale)


def other_names(n, x):
    scale = (n.gain / (n.spread + 1e-3).sqrt())[:, None, None]
    return (x - n.centre[:, None, None]) * scale + n.offset[None, :, None, None]


def without_epsilon(n, x):
    return (x - n.bias[:, None, None]) / n.running_var.sqrt()[:, None, None]


def quotient(n, x):
    scale = (n.weight / n.running_var.sqrt())[:, None, None]
    return x * scale + (n.bias[:, None, None] - n.running_mean[:, None, None] * scale)


def frozen_batch_norm(n, x):
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False)


def cast(n, x):
    return (x.float() * n.weight.float().view(-1, 1, 1) + n.bias.float()[:, None, None]).double()


def joined(n, x):
    return torch.cat([x + n.bias[:, None, None], x * n.weight[:, None, None]], 1)


NAMES = ("gain", "offset", "centre", "spread")
FROZEN = {
    "torchvision's": (lambda: Buffers(torchvision), {"weight", "bias"}),
    "other names": (lambda: Buffers(other_names, names=NAMES), {"offset", "centre"}),
    "no epsilon": (lambda: Buffers(without_epsilon), {"bias"}),
    "a quotient without epsilon": (lambda: Buffers(quotient), {"weight", "bias"}),
    "a scale and a shift": (lambda: Buffers(lambda n, x: x * n.weight + n.bias, (WIDTH, 1, 1)), {"bias"}),
    "F.batch_norm": (lambda: Buffers(frozen_batch_norm), {"running_mean", "bias"}),
    "a cast": (lambda: Buffers(cast), {"bias"}),
    "beside a mask": (lambda: Buffers(joined), {"bias"}),
    "a mask": (lambda: Buffers(lambda n, x: x * n.weight[:, None, None]), set()),
    "torch's own": (lambda: nn.BatchNorm2d(WIDTH).requires_grad_(False), {"weight", "bias"}),
    "torch's own, without affine": (lambda: nn.BatchNorm2d(WIDTH, affine=False), {"running_mean"}),
}


def network(body, after=lambda n: nn.Conv2d(n, 4, 3, padding=1)) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(2, WIDTH, 3, padding=1), body, nn.ReLU())
    torch.manual_seed(0)
    made.append(after(made.double()(IMAGES).shape[1]))
    return converted(made)


def seen(net, *, train=False) -> tuple[Channels, Watcher]:
    net.train(train)
    watcher = Watcher(net)
    with watcher:
        net(IMAGES)
    return watcher.channels(), watcher


@pytest.mark.parametrize("name", FROZEN)
def test_a_constant_in_a_buffer_fades(name):
    """A constant that buffers add hinders no removal; the buffers that it comes from fade, and no others."""
    make, fading = FROZEN[name]
    net = network(make())
    channels, watcher = seen(net)
    assert watcher.failures == []
    assert removable_of(channels, "0") == WIDTH
    assert {s.name for s in channels.slots if s.fades} - {"0.bias", "3.bias"} == {f"1.{n}" for n in fading}
    if name != "a cast":
        assert_exact(net, channels, IMAGES)


def test_frozen_biases_fade():
    """A bias that is not trained fades as one that is trained does."""
    net = network(nn.Identity())
    net[0].bias.requires_grad_(False)
    channels, _ = seen(net)
    assert removable_of(channels, "0") == WIDTH
    assert_exact(net, channels, IMAGES)


def test_fades_what_is_zero_already():
    """Where a product is zero once either factor is, the factor with fewer entries left to fade is the one to fade."""
    body = Buffers(lambda n, x: x + (n.weight * n.bias)[:, None, None])
    for name in ("weight", "bias"):
        net = network(body)
        other = {"weight": "bias", "bias": "weight"}[name]
        body.get_buffer(name).zero_()
        body.get_buffer(other).fill_(1)
        channels, _ = seen(net)
        assert {s.name for s in channels.slots if s.name.startswith("1.") and s.fades} == {f"1.{name}"}


def counted(n, x):
    n.bias.add_(1)
    return x + n.bias[:, None, None]


def replaced(n, x):
    n.bias = n.bias + 1
    return x + n.bias[:, None, None]


def viewed(n, x):
    n.bias.view(2, -1)[0] += 1
    return x + n.bias[:, None, None]


@pytest.mark.parametrize("compute", [counted, replaced, viewed])
def test_a_buffer_that_steps_rewrite_does_not_fade(compute):
    """A buffer to which steps write other values than zero keeps its entries."""
    channels, _ = seen(network(Buffers(compute)))
    assert not any(s.fades for s in channels.slots if s.name == "1.bias")
    assert all(s.rewritten for s in channels.slots if s.name == "1.bias")


def by_hand(n, x):
    if n.training:
        mean = x.mean((0, 2, 3))
        n.running_mean.mul_(0.9).add_(0.1 * mean.detach())
    else:
        mean = n.running_mean
    return (x - mean[:, None, None]) * n.weight[:, None, None]


def test_running_statistics_by_hand_fade():
    """A running mean that steps update with means of dead channels, which are zero, fades where evaluation needs it."""
    net = network(Buffers(by_hand))
    first, _ = seen(net, train=True)
    assert not any(s.fades or s.rewritten for s in first.slots if s.name == "1.running_mean")
    watcher = Watcher(net.eval(), earlier=first)
    with watcher:
        net(IMAGES)
    channels = Channels.from_state_dict(watcher.channels().state_dict())
    assert removable_of(channels, "0") == WIDTH
    assert [s.fades for s in channels.slots if s.name == "1.running_mean"] == [True]
    assert_exact(net, channels, IMAGES)
    again = Watcher(net.train(), earlier=channels)
    with again:
        net(IMAGES)
    assert [s.fades for s in again.channels().slots if s.name == "1.running_mean"] == [True]


def test_what_an_earlier_step_rewrote_does_not_fade_later():
    """What one step has shown of a buffer holds for the next one."""

    def compute(n, x):
        if n.training:
            n.bias.add_(1)
            return x
        return x + n.bias[:, None, None]

    net = network(Buffers(compute))
    first, _ = seen(net, train=True)
    watcher = Watcher(net.eval(), earlier=first)
    with watcher:
        net(IMAGES)
    assert not any(s.fades for s in watcher.channels().slots if s.name == "1.bias")


STAY = {
    "one value per place": Buffers(lambda n, x: x + n.bias, (WIDTH, 5, 5)),
    "one value for all": Buffers(lambda n, x: x + n.bias, (1,)),
    "a sum of the buffer": Buffers(lambda n, x: x * (n.bias / n.bias.sum())[:, None, None]),
    "a wave of the buffer": Buffers(lambda n, x: x + n.bias.cos()[:, None, None]),
    "not saved": Buffers(lambda n, x: x + n.bias[:, None, None]),
}


@pytest.mark.parametrize("name", STAY)
def test_other_constants_keep_the_channels(name):
    """A constant that cannot fade, or whose fading would change other channels, keeps the channels."""
    net = network(STAY[name])
    if name == "not saved":
        net[1]._non_persistent_buffers_set.add("bias")
    channels, _ = seen(net)
    assert removable_of(channels, "0") == 0
    assert reason(channels, "0")


def test_a_scale_that_would_divide_by_zero_does_not_fade():
    """A buffer fades only where the results stay finite."""
    net = network(Buffers(lambda n, x: x + (n.bias / n.bias)[:, None, None]))
    channels, _ = seen(net)
    assert removable_of(channels, "0") == 0
    assert not any(s.fades for s in channels.slots if s.name == "1.bias")


def test_fits_of_frozen_backbones_shrink():
    """Two convolutions with frozen normalization between them, with padding behind it, shrink exactly."""
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), Buffers(torchvision, (8,)), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), Buffers(torchvision, (8,)), nn.ReLU(),
        nn.Conv2d(8, 5, 3, padding=1),
    )  # fmt: skip
    channels, _ = watched(converted(net), IMAGES)
    assert removable_of(channels, "0") == 8
    smaller, plan = half_removed(net, channels)
    assert plan.widths["0"] == plan.widths["3"]
    assert torch.allclose(net(IMAGES), smaller(IMAGES), atol=1e-12)
