"""The price in bytes moves weights by exactly its gradient times gamma, once a step, however steps are made."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from networks import Gan, Lit, batches, make_trainer
from optimizers import Lookahead, Sam
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.prices import price_of

GAMMA = 0.5
STEP = 1.0  # the learning rate


def gradients(model, price="bytes", gamma=GAMMA):
    """Gamma times the gradient of the price with respect to each weight, by the weight's id."""
    account, found = price_of(price)(model), {}
    for p, pull in zip(account.parameters, account.pulls(gamma), strict=True):
        kept, p.latent.grad = p.latent.grad, torch.zeros_like(p.latent)
        if pull.weight is not None:
            pull.weight(1.0)
        found[id(p.latent)], p.latent.grad = p.latent.grad, kept
    return found


@contextmanager
def steps_of(kind, look):
    """Within this context ``look(optimizer)`` is called right before each step of optimizers of exactly this class.

    What it returns is called right after the step.
    """
    open_steps = {}

    def before(optimizer, args, kwargs):
        if type(optimizer) is kind and id(optimizer) not in open_steps:
            open_steps[id(optimizer)] = look(optimizer)

    def after(optimizer, args, kwargs):
        if id(optimizer) in open_steps:
            open_steps.pop(id(optimizer))()

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield
    for hook in hooks:
        hook.remove()


def ratios_of(model, price="bytes", kind=torch.optim.SGD, **settings):
    """Fits a module whose loss has no gradient; returns what each step moved its weights by, and what was expected."""
    seen = []
    gamma = settings.pop("gamma", GAMMA)

    def look(optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p.latent for p in quantized_parameters(model) if id(p.latent) in held]
        expected, before = gradients(model, price, gamma), [w.detach().clone() for w in own]

        def compare():
            moved = torch.cat([(a - w.detach()).flatten() for a, w in zip(before, own, strict=True)])
            seen.append((moved / STEP, torch.cat([expected[id(w)].flatten() for w in own])))

        return compare

    with steps_of(kind, look):
        make_trainer(SelfCompression(gamma=gamma, price=price), **settings).fit(model, batches())
    return seen


def assert_exact(seen, steps):
    assert len(seen) == steps
    for moved, expected in seen:
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-7)


def descent(module):
    return torch.optim.SGD(module.parameters(), lr=STEP)


class Still(Lit):
    """Its loss has gradients, all of which are zero."""

    def __init__(self, make_optimizer=descent):
        super().__init__(make_optimizer)

    def loss(self, batch):
        return super().loss(batch) * 0.0


class ByHand(Still):
    def __init__(self, make_optimizer=descent):
        super().__init__(make_optimizer)
        self.automatic_optimization = False


class TwoBackwards(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Accumulating(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Raw(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Unwrapped(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class WithClosure(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Clipped(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=1e-6, gradient_clip_algorithm="norm")
        optimizer.step()


class Sharp(ByHand):
    def __init__(self):
        super().__init__(lambda m: Sam(m.parameters(), lambda groups: torch.optim.SGD(groups, lr=STEP)))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()


class StillGan(Gan):
    def discriminator_loss(self, images, noise):
        return super().discriminator_loss(images, noise) * 0.0

    def manual_backward(self, loss, *args, **kwargs):
        super().manual_backward(loss * 0.0, *args, **kwargs)

    def configure_optimizers(self):
        return [descent(self.generator), descent(self.discriminator)]


class Both(torch.optim.Optimizer):
    """Steps two optimizers, each of which holds a part of the weights."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class Derived(torch.optim.SGD):
    """Its step is that of its base class, whose hooks torch runs as well."""

    def step(self, closure=None):
        return super().step(closure)


def both(module):
    return Both(descent(module.net[:4]), descent(module.net[4:]))


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


CASES = {
    "plain": (Still, {}, 8),
    "accumulate_grad_batches=4": (Still, {"accumulate_grad_batches": 4}, 2),
    "gradient clipping by norm": (Still, {"gradient_clip_val": 1e-6}, 8),
    "gradient clipping by value": (Still, {"gradient_clip_val": 1e-6, "gradient_clip_algorithm": "value"}, 8),
    "a GradScaler": (Still, {"plugins": scaled}, 8),
    "a GradScaler, accumulated": (Still, {"plugins": scaled, "accumulate_grad_batches": 2}, 4),
    "a GradScaler, clipped": (Still, {"plugins": scaled, "gradient_clip_val": 1e-6}, 8),
    "bf16-mixed": (Still, {"precision": "bf16-mixed"}, 8),
    "64-true": (Still, {"precision": "64-true"}, 8),
    "two backward passes": (TwoBackwards, {}, 8),
    "accumulated by hand": (Accumulating, {}, 4),
    "loss.backward()": (Raw, {}, 8),
    "use_pl_optimizer=False": (Unwrapped, {}, 8),
    "a closure by hand": (WithClosure, {}, 8),
    "clip_gradients": (Clipped, {}, 8),
    "several groups": (
        lambda: Still(lambda m: torch.optim.SGD([{"params": [p]} for p in m.parameters()], lr=STEP)),
        {},
        8,
    ),
    "two optimizers": (StillGan, {}, 16),
    "an optimizer inside another": (lambda: Still(lambda m: Lookahead(descent(m))), {}, 8),
    "SAM": (Sharp, {}, 8),
    "two optimizers inside another": (lambda: Still(both), {}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_gamma_times_the_gradient(case):
    """With a loss without gradient every weight moves by gamma times the price's gradient, in each step once."""
    make, settings, steps = CASES[case]
    if "plugins" in settings:
        settings = settings | {"plugins": settings["plugins"]()}
    assert_exact(ratios_of(make(), **settings), steps)


@pytest.mark.parametrize("base", ["new", "used before"])
def test_a_step_that_calls_that_of_its_base_class(base):
    """Where torch runs the hooks of a step twice, for a class and for its base class, the price is added once."""
    if base == "used before":
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    seen = ratios_of(Still(lambda m: Derived(m.parameters(), lr=STEP)), kind=Derived)
    assert_exact(seen, 8)


@pytest.mark.parametrize("price", ["bytes", "bits"])
@pytest.mark.parametrize("make", [Still, StillGan, Sharp])
def test_gamma_zero_leaves_weights_alone(price, make):
    """Without gamma, or with a price of depths alone, no weight moves."""
    seen = ratios_of(make(), price, gamma=0.0 if price == "bytes" else GAMMA)
    assert len(seen) >= 8
    assert not any(bool(moved.any()) for moved, _ in seen)


def own_price(module):
    """Reads all quantized weights, as a price of the user's own may."""
    return sum(layer.weight.square().sum() for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


@pytest.mark.parametrize("case", ["plain", "accumulate_grad_batches=4", "a GradScaler", "two optimizers", "SAM"])
def test_a_price_of_the_users_own(case):
    """A function of the module that reads ``layer.weight`` moves weights by its gradient through the quantizer."""
    make, settings, steps = CASES[case]
    if "plugins" in settings:
        settings = settings | {"plugins": settings["plugins"]()}
    assert_exact(ratios_of(make(), own_price, gamma=0.1, **settings), steps)


def test_the_losss_own_gradient_stays_beside_it(monkeypatch):
    """The price comes on top of the loss's gradient, which is what it is without a price."""

    class Looking(torch.optim.SGD):
        def step(self, closure=None):
            def look():
                loss = closure()
                found.append([p.latent.grad.clone() for p in quantized_parameters(model)])
                prices.append([gradients(model, gamma=gamma)[id(p.latent)] for p in quantized_parameters(model)])
                return loss

            return super().step(look)

    ends = []
    for gamma in (0.0, GAMMA):
        torch.manual_seed(3)
        found, prices = [], []
        model = Lit(lambda m: Looking(m.parameters(), lr=0.0))
        make_trainer(SelfCompression(gamma=gamma, bits_lr=1e-12)).fit(model, batches())
        ends.append((found, prices))
    (without, _), (with_price, prices) = ends
    for plain, priced, price in zip(without, with_price, prices, strict=True):
        for a, b, c in zip(plain, priced, price, strict=True):
            torch.testing.assert_close(b - a, c, rtol=1e-3, atol=1e-6)


class Quasi(torch.optim.LBFGS):
    """Looks at the gradients that each evaluation of the closure leaves."""

    def step(self, closure):
        def look():
            loss = closure()
            self.look()
            return loss

        return super().step(look)


def test_every_evaluation_of_a_closure_has_the_price_once():
    """However often LBFGS evaluates, the gradient is the price's at the weights as they are then."""
    seen = []

    class Evaluated(Still):
        def configure_optimizers(self):
            optimizer = Quasi(self.parameters(), lr=0.1, max_iter=4)
            optimizer.look = self.look
            return optimizer

        def look(self):
            expected = gradients(self)
            seen.extend((p.latent.grad.clone(), expected[id(p.latent)]) for p in quantized_parameters(self))

    make_trainer(SelfCompression(gamma=GAMMA)).fit(Evaluated(), batches(3))
    assert len(seen) > 3 * 3
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("gamma", [1e300, lambda step: 1e200])
def test_a_price_that_is_infinite_moves_nothing(gamma):
    """A gamma whose gradient no float holds leaves weights where the loss leads them."""
    ends = []
    for own in (0.0, gamma):
        torch.manual_seed(3)
        model = Lit(lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
        make_trainer(SelfCompression(gamma=own, bits_lr=1e-12)).fit(model, batches())
        ends.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_step_that_a_grad_scaler_skips():
    """Where a GradScaler finds infinities no weight moves, by the loss or by the price."""

    class Broken(Still):
        def loss(self, batch):
            return super().loss(batch) + (self.net(batch[0]).sum() * float("inf"))

    model, start = Broken(), []
    model.on_train_start = lambda: start.extend(p.detach().clone() for p in model.parameters())
    make_trainer(SelfCompression(gamma=GAMMA), plugins=scaled()).fit(model, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


class Heads(Still):
    """A frozen layer, and a head that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(16, 4)
        self.net[0].weight.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=STEP)


class Zeros(Heads):
    """Leaves gradients of zeros, also in the head that no loss reaches."""

    def on_train_start(self):
        for p in self.spare.parameters():
            p.grad = torch.zeros_like(p)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("make", [Heads, Zeros])
def test_what_the_loss_does_not_reach_stays(make):
    """Frozen weights and weights that no loss reaches keep values, depths and exponents."""
    model, start = make(), {}
    kept = ("spare.", "net.0.weight", "net.0.bit_depth", "net.0.exponent")
    model.on_fit_start = lambda: start.update({n: t.clone() for n, t in model.state_dict().items()})
    make_trainer(SelfCompression(gamma=GAMMA)).fit(model, batches())
    for name, tensor in model.state_dict().items():
        if name.startswith(kept):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(model.net[4].latent("weight"), start["net.4.weight"])
