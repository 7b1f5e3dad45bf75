"""Every way to optimize that Lightning knows, while channels leave: no loss is another for it."""

import math

import pytest
import torch
from fits import GAN, NEVER, RecordingGan, Widths, assert_learning, assert_only_living, data, fit, largest_difference
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from networks import Lit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader

from lightning_selfcompress.quantize.parameters import quantized_parameters

SMALLER = [(4, 4, 4 * 36, 13), (3, 3, 3 * 36, 12), (3, 3, 3 * 36, 10), (3, 3, 3 * 36, 10)]
SCHEDULERS = torch.optim.lr_scheduler


class Checkpointed(Lit):
    """Forgets the activations of both halves and computes them again in backward."""

    reentrant = False

    def loss(self, batch):
        hidden = batch[0].requires_grad_(self.reentrant)  # without, the reentrant kind has no gradients
        for half in (self.net[:3], self.net[3:]):
            hidden = checkpoint(half, hidden, use_reentrant=self.reentrant)
        return nn.functional.cross_entropy(hidden, batch[1])


class Reentrant(Checkpointed):
    reentrant = True


class Sometimes(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 3 != 1 else None


class Results(Lit):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "logits": self.net(batch[0]).detach(), "n": 4}


def with_optimizer(make_optimizer):
    return lambda: Lit(make_optimizer)


def with_scheduler(make, **config):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step", **config}}

    return with_optimizer(configure)


def by_dimensions(module):
    large = [p for p in module.parameters() if p.dim() > 1]
    small = [p for p in module.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": large}, {"params": small, "weight_decay": 0.0, "lr": 1e-4}], lr=1e-3)


descent = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.05))

CASES = {
    "accumulate_grad_batches=4": (Lit, {"accumulate_grad_batches": 4}),
    "gradient clipping by norm": (descent, {"gradient_clip_val": 0.05}),
    "gradient clipping by value": (descent, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "training_step that returns None now and then": (Sometimes, {}),
    "training_step that returns a dict": (Results, {}),
    "activation checkpointing, not reentrant": (Checkpointed, {}),
    "activation checkpointing, reentrant": (Reentrant, {}),
    "several parameter groups": (with_optimizer(by_dimensions), {}),
    "a scheduler that steps with each step": (with_scheduler(lambda o: SCHEDULERS.StepLR(o, 50, 0.5)), {}),
    "OneCycleLR": (with_scheduler(lambda o: SCHEDULERS.OneCycleLR(o, 0.05, total_steps=240)), {}),
    "ReduceLROnPlateau": (
        with_scheduler(lambda o: SCHEDULERS.ReduceLROnPlateau(o, patience=0), interval="epoch", monitor="loss"),
        {},
    ),
}


def assert_no_loss_changes(callbacks=list, **kwargs):
    """Dead channels leave after every epoch, and every loss is that of the network that kept them."""
    widths = Widths()
    model, trainer = fit(1, widths, *callbacks(), **kwargs)
    kept, _ = fit(NEVER, *callbacks(), **kwargs)
    assert widths.seen == SMALLER
    assert kept.net[0].out_channels == 6
    assert_only_living(trainer, model)
    difference = largest_difference(model.losses, kept.losses)
    print(f"{difference:.2e}")
    assert difference < 1e-5
    assert len(set(model.losses[-30:])) > 15
    assert_learning(trainer)


@pytest.mark.case("Optimization", "{how}")
@pytest.mark.parametrize("how", CASES)
def test_no_loss_changes(how):
    """However the network is optimized, removal of its dead channels changes no loss."""
    make, settings = CASES[how]
    assert_no_loss_changes(make=make, **settings)


@pytest.mark.case("Optimization", "GradientAccumulationScheduler")
def test_accumulation_that_changes():
    """The number of accumulated batches may change from epoch to epoch."""
    assert_no_loss_changes(lambda: [GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})])


@pytest.mark.case("Optimization", "LBFGS")
def test_lbfgs():
    """LBFGS goes on after each removal, on the same loss, and makes it smaller."""

    def make():
        return Lit(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.05, max_iter=3))

    widths = Widths()
    loader = DataLoader(ConcatDataset([data(n=1).dataset] * 60), batch_size=4)
    model, trainer = fit(1, widths, make=make, loader=loader)
    kept, _ = fit(NEVER, make=make, loader=loader)
    assert widths.seen == SMALLER
    assert_only_living(trainer, model)
    assert largest_difference(model.losses[:180], kept.losses[:180]) < 1e-10
    assert all(map(math.isfinite, model.losses))
    print(model.losses[0], model.losses[-1], kept.losses[-1])
    assert model.losses[-1] < 0.5 * model.losses[0]


@pytest.mark.case("Optimization", "no optimizer")
def test_without_optimizer():
    """Where nothing is trained, which a warning says, channels that are dead leave all the same."""
    widths = Widths()
    with pytest.warns(UserWarning, match="no optimizer trains this module"):
        model, _ = fit(1, widths, make=with_optimizer(lambda m: None))
    assert widths.seen == SMALLER
    assert all(bool(((p.raw_depth == 8) | (p.raw_depth == -1)).all()) for p in quantized_parameters(model))


class Toggling(RecordingGan):
    def training_step(self, batch, batch_idx):
        noise = torch.randn(len(batch[0]), 5, generator=torch.Generator().manual_seed(batch_idx)).to(batch[0])
        one, two = self.optimizers()
        for optimizer in (one, two):
            self.toggle_optimizer(optimizer)
            if optimizer is one:
                loss = -self.discriminator(self.generator(noise)).mean()
            else:
                loss = self.discriminator_loss(batch[0], noise)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.case("Optimization", "manual optimization with two optimizers{how}")
@pytest.mark.parametrize(("how", "make"), [("", RecordingGan), (" and toggle_optimizer", Toggling)])
def test_two_optimizers_and_manual_optimization(how, make):
    """Under manual optimization both networks of a GAN shrink, and neither loss is another for it."""
    model, trainer = fit(1, make=make, schedule=GAN, max_epochs=3)
    kept, _ = fit(NEVER, make=make, schedule=GAN, max_epochs=3)
    assert (model.generator[0].out_features, model.generator[2].in_features) == (9, 9)
    assert (model.discriminator[0].out_features, model.discriminator[2].in_features) == (9, 9)
    assert_only_living(trainer, model)
    assert len(model.losses) == 360
    difference = largest_difference(model.losses, kept.losses)
    print(f"GAN: {difference:.2e}")
    assert difference < 1e-5
