"""Depths and exponents out of the user's optimizer, and into one of their own that steps along."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.training.depth_optimizer import DepthOptimizer, cooldown_factor


def make_net():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    convert(net, initial_bits=4)
    with torch.no_grad():
        for p in quantized_parameters(net):
            p.exponent.sub_(1)  # some weights are clipped: depths have a gradient of the loss
    return net


def learned(net):
    """Depths and exponents, in the order of their gradients."""
    return [t for p in quantized_parameters(net) for t in p.learned]


def backward(net, scale=1.0):
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    (net(x).square().mean() * scale).backward()


def make_optimizers(net, make=torch.optim.SGD, gamma=0.5, lr=0.01, attach=True, **settings):
    """The user's optimizer, without depths, and that of the depths, attached to it."""
    owner = make(net.parameters(), lr=0.01)
    depths = DepthOptimizer(owner, ModelSize.of(net), lr=lr, gamma=lambda: gamma, **settings)
    if attach:
        depths.attach()
    return owner, depths


def record_steps(depths, monkeypatch):
    """A list that gets the gradients that each step of the depths is taken on."""
    steps, step = [], depths.adam.step

    def recorded():
        steps.append(
            [None if p.grad is None else p.grad.clone() for g in depths.adam.param_groups for p in g["params"]]
        )
        return step()

    monkeypatch.setattr(depths.adam, "step", recorded)
    return steps


class TestStep:
    """What a step of the depths is taken on, and when there is none."""

    @pytest.mark.parametrize("scale", [1.0, 65536.0, 0.125])
    @pytest.mark.parametrize("accumulated", [1, 3])
    def test_gradient_is_the_loss_and_gamma_times_the_size(self, scale, accumulated, monkeypatch):
        """Depths step on dL/db + gamma dQ/db exactly, whatever the loss was scaled with or summed over."""
        net = make_net()
        for _ in range(accumulated):
            backward(net)
        expected = [p.grad.clone() for p in learned(net)]
        net.zero_grad()
        owner, depths = make_optimizers(net, gamma=0.7, gradient_scale=lambda: scale)
        weights = sum(p.latent.numel() for p in quantized_parameters(net))
        for i, p in enumerate(quantized_parameters(net)):
            expected[2 * i] += 0.7 * p.weights_per_channel / weights
        steps = record_steps(depths, monkeypatch)
        for _ in range(accumulated):
            backward(net, scale)
        owner.step()
        assert len(steps) == 1
        assert_close(steps[0], expected, rtol=1e-5, atol=1e-7)

    def test_size_gradient_alone(self, monkeypatch):
        """With a loss that does not depend on the depths the step's gradient is gamma dQ/db, in a ratio of 1."""
        net = make_net()
        owner, depths = make_optimizers(net, gamma=0.05, gradient_scale=lambda: 1024.0)
        steps = record_steps(depths, monkeypatch)
        (sum(p.sum() for p in learned(net)) * 0.0).backward()
        owner.step()
        for gradient, exact in zip(steps[0][::2], ModelSize.of(net).gradients(0.05), strict=True):
            assert_close(gradient / exact, torch.ones_like(gradient), rtol=1e-6, atol=0)
        assert all(not bool(gradient.any()) for gradient in steps[0][1::2])

    def test_gamma_and_scale_are_read_at_each_step(self, monkeypatch):
        """A gamma that changes while training counts from the next step on."""
        net, gammas = make_net(), iter([0.0, 1.0])
        owner = torch.optim.SGD(net.parameters(), lr=0.0)
        depths = DepthOptimizer(owner, ModelSize.of(net), lr=1e-9, gamma=lambda: next(gammas))
        depths.attach()
        steps = record_steps(depths, monkeypatch)
        for _ in range(2):
            backward(net)
            owner.step()
        change = [after - before for before, after in zip(*steps, strict=True)]
        assert_close(change[::2], list(ModelSize.of(net).gradients(1.0)), rtol=1e-4, atol=1e-6)

    def test_first_step_moves_depths_by_the_learning_rate(self):
        """Adam's first step takes every depth down by the learning rate where only the size has a say."""
        net = make_net()
        owner, _ = make_optimizers(net, gamma=1e-6, lr=0.25)
        (sum(p.sum() for p in learned(net)) * 0.0).backward()
        owner.step()
        for p in quantized_parameters(net):
            assert_close(p.raw_depth.detach(), torch.full((p.channels,), 3.75))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["bit_depth", "exponent"])
    def test_a_gradient_that_is_not_finite_skips_the_step(self, bad, name):
        """Depths and exponents stay as they are to the bit, the skip is counted, and the next step is a normal one."""
        net = make_net()
        owner, depths = make_optimizers(net)
        backward(net)
        before = [p.detach().clone() for p in learned(net)]
        getattr(net[3], name).grad[1] = bad
        owner.step()
        assert all(torch.equal(p, q) for p, q in zip(learned(net), before, strict=True))
        assert depths.skipped_steps == 1
        assert depths.adam.state_dict()["state"] == {}
        assert all(p.grad is None for p in learned(net))
        backward(net)
        owner.step()
        assert depths.skipped_steps == 1
        assert not any(torch.equal(p, q) for p, q in zip(learned(net), before, strict=True))

    def test_without_a_gradient_of_the_loss_there_is_no_step(self):
        """A step of the owner without a backward, as for the other network of a GAN, does not shrink this one."""
        net = make_net()
        owner, depths = make_optimizers(net)
        before = [p.detach().clone() for p in learned(net)]
        owner.step()
        assert depths.step() is False
        assert all(torch.equal(p, q) for p, q in zip(learned(net), before, strict=True))
        assert depths.skipped_steps == 0

    def test_learning_rate_zero_holds_everything(self):
        """At lr=0 depths and exponents stay at their bits, their gradients are cleared, and nothing is counted."""
        net = make_net()
        owner, depths = make_optimizers(net, lr=0.0)
        before = [p.detach().clone() for p in learned(net)]
        backward(net)
        owner.step()
        assert all(torch.equal(p, q) for p, q in zip(learned(net), before, strict=True))
        assert all(p.grad is None for p in learned(net))
        assert (depths.adam, depths.skipped_steps) == (None, 0)
        depths.set_lr(0.1)
        backward(net)
        assert depths.step() is False

    def test_set_lr(self):
        """The rate that is set is that of the next step."""
        net = make_net()
        owner, depths = make_optimizers(net, gamma=1.0, lr=0.25)
        depths.set_lr(0.5)
        (sum(p.sum() for p in learned(net)) * 0.0).backward()
        owner.step()
        assert_close(net[3].bit_depth.detach(), torch.full((4,), 3.5))

    def test_frozen_depths_stay(self):
        """Depths that need no gradient get none from the size either."""
        net = make_net()
        net[0].bit_depth.requires_grad_(False)
        owner, _ = make_optimizers(net)
        backward(net)
        owner.step()
        assert net[0].bit_depth.tolist() == [4.0] * 3
        assert net[3].bit_depth.tolist() != [4.0] * 4

    def test_dead_channels_stay_dead(self):
        """A channel without bits gets no gradient, from neither the loss nor the size."""
        net = make_net()
        with torch.no_grad():
            net[3].bit_depth[1] = -0.5
        owner, _ = make_optimizers(net, gamma=1.0, lr=0.25)
        for _ in range(3):
            backward(net)
            owner.step()
        assert net[3].bit_depth[1].item() == -0.5

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
    def test_weight_decay_of_the_owner_has_no_effect(self, make):
        """Depths and exponents take the same steps whatever the owner's weight decay, rate or clipping."""
        ends = []
        for settings in ({"weight_decay": 0.0}, {"weight_decay": 0.5}):
            torch.manual_seed(0)
            net = make_net()
            owner = make(net.parameters(), lr=0.0, **settings)
            DepthOptimizer(owner, ModelSize.of(net), lr=0.05, gamma=lambda: 0.5).attach()
            for _ in range(3):
                owner.zero_grad()
                backward(net)
                owner.step()
            ends.append([p.detach().clone() for p in learned(net)])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        assert ends[0][0].tolist() != [4.0] * 3

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("factor", [1.0, float("inf")])
    def test_a_step_that_a_grad_scaler_skips_is_skipped(self, fused, factor):
        """Where a GradScaler finds infinities the depths step no more than the owner, fused or not; else both do."""
        net = make_net()
        owner = torch.optim.Adam(net.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        depths = DepthOptimizer(owner, ModelSize.of(net), lr=0.01, gamma=lambda: 0.5, gradient_scale=scaler.get_scale)
        depths.attach()
        before = [net[3].bit_depth.tolist(), net[3].bias.tolist()]
        scaler.scale(net(torch.ones(2, 1, 4, 4)).square().mean() * factor).backward()
        scaler.step(owner)
        scaler.update()
        owner.zero_grad()
        moved = [
            now != then for now, then in zip([net[3].bit_depth.tolist(), net[3].bias.tolist()], before, strict=True)
        ]
        assert moved == [factor == 1.0, factor == 1.0]
        assert all(p.grad is None for p in learned(net))
        assert depths.skipped_steps == 0

    def test_two_owners_share_a_model(self):
        """Of two optimizers each takes its own depths along, by shares of one Q."""
        net = make_net()
        whole = ModelSize.of(net)
        owners, optimizers = [], []
        for layer in (net[0], net[3]):
            owner = torch.optim.SGD(layer.parameters(), lr=0.01)
            share = whole.part(list(quantized_parameters(layer)))
            optimizers.append(DepthOptimizer(owner, share, lr=0.01, gamma=lambda: 0.5))
            optimizers[-1].attach()
            owners.append(owner)
        backward(net)
        owners[0].step()
        assert net[0].bit_depth.tolist() != [4.0] * 3
        assert net[3].bit_depth.tolist() == [4.0] * 4
        assert net[3].bit_depth.grad is not None


class TestAttachment:
    """Stepping and clearing along with the user's optimizer."""

    def test_zero_grad_of_the_owner_clears_depths(self):
        """zero_grad of the owner, and of what wraps it, clears the gradients of depths and exponents as well."""

        class Wrapper:
            def __init__(self, optimizer):
                self.optimizer = optimizer

            def zero_grad(self, set_to_none=True):
                self.optimizer.zero_grad(set_to_none=set_to_none)

        net = make_net()
        owner = torch.optim.SGD(net.parameters(), lr=0.01)
        wrapper = Wrapper(owner)
        depths = DepthOptimizer(owner, ModelSize.of(net), lr=0.01, gamma=lambda: 0.5, wrappers=[wrapper])
        depths.attach()
        for face in (owner, wrapper):
            backward(net)
            face.zero_grad(set_to_none=False)
            assert all(p.grad is None for p in learned(net))
            assert not bool(net[0].bias.grad.any())

    def test_detach_undoes_attach(self):
        """After detach steps of the owner leave depths alone, and zero_grad is the method of its class again."""
        net = make_net()
        owner, depths = make_optimizers(net, attach=False)
        hooks, own = dict(owner._optimizer_step_post_hooks), set(vars(owner))
        depths.attach()
        depths.detach()
        depths.detach()
        assert (dict(owner._optimizer_step_post_hooks), set(vars(owner))) == (hooks, own)
        assert owner.zero_grad.__func__ is torch.optim.Optimizer.zero_grad
        backward(net)
        before = [p.detach().clone() for p in learned(net)]
        owner.step()
        owner.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(learned(net), before, strict=True))
        assert all(p.grad is not None for p in learned(net))

    def test_detach_restores_what_another_put_there(self):
        """A zero_grad that someone set on the instance before attach is there again after detach."""
        net, calls = make_net(), []
        owner, depths = make_optimizers(net, attach=False)
        own = owner.zero_grad = lambda set_to_none=True: calls.append(set_to_none)
        depths.attach()
        owner.zero_grad()
        depths.detach()
        assert calls == [True]
        assert owner.zero_grad is own

    def test_attaching_again(self):
        """Detached and attached again, one step of the owner is one step of the depths."""
        net = make_net()
        owner, depths = make_optimizers(net, gamma=1.0, lr=0.25)
        depths.detach()
        depths.attach()
        (sum(p.sum() for p in learned(net)) * 0.0).backward()
        owner.step()
        assert_close(net[3].bit_depth.detach(), torch.full((4,), 3.75))

    def test_nothing_to_train(self):
        """For an optimizer that owns no quantized weight every step is nothing."""
        net = nn.Sequential(nn.LayerNorm(3))
        owner = torch.optim.SGD(net.parameters(), lr=0.1)
        depths = DepthOptimizer(owner, ModelSize.of(net), lr=0.1, gamma=lambda: 1.0)
        depths.attach()
        net(torch.randn(2, 3)).square().sum().backward()
        owner.step()
        owner.zero_grad()
        assert depths.step() is False


@pytest.mark.parametrize(
    ("progress", "share", "factor"),
    [
        (0.0, 0.25, 1.0),
        (0.75, 0.25, 1.0),
        (0.875, 0.25, 0.5),
        (1.0, 0.25, 0.0),
        (1.5, 0.25, 0.0),
        (0.5, 1.0, 0.5),
        (1.0, 0.0, 1.0),
    ],
)
def test_cooldown_factor(progress, share, factor):
    """The factor is 1 until the last share of the training and falls to 0 in a straight line; 0 means no fall."""
    assert cooldown_factor(progress, share) == factor
