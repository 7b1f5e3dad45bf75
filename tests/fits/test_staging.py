"""The size joins in ``on_before_backward``: evaluated once a step, logged beside the loss, stepped on exactly."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from fits import SCHEDULE, Kill, data
from networks import Gan, Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.size.model_bytes import ModelBytes
from lightning_selfcompress.size.price import ModelSize

PRICES = {"bytes": ModelBytes, "bits": ModelSize}


@pytest.fixture
def evaluated(monkeypatch):
    """Counts how often the price's gradient is evaluated."""
    calls = []

    def count(price):
        pulls = price.pulls

        def counted(self, factor):
            calls.append(factor)
            return pulls(self, factor)

        monkeypatch.setattr(price, "pulls", counted)

    for price in PRICES.values():
        count(price)
    return calls


class TwoBackwards(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(0.5 * self.loss(batch))
        self.manual_backward(0.5 * self.loss(batch))
        optimizer.step()


class Raw(TwoBackwards):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "settings", "steps"),
    [(Lit, {}, 8), (Lit, {"accumulate_grad_batches": 4}, 2), (TwoBackwards, {}, 8), (Raw, {}, 8)],
)
@pytest.mark.parametrize("price", PRICES)
def test_evaluated_once_for_each_step(make, settings, steps, price, evaluated):
    """However many backward passes a step has, and whether or not Lightning sees them, the price is evaluated once."""
    # once channels are known the price is another one
    compression = SelfCompression(gamma=0.25, price=price, prune_every_n_epochs=0)
    make_trainer(compression, **settings).fit(make(), batches())
    assert evaluated == [0.25] * steps


@pytest.mark.parametrize("price", PRICES)
def test_step_of_another_optimizer_makes_it_stale(price, evaluated):
    """With two optimizers each step is on the size as it is then, not as it was before the other's step."""
    asked = []
    make_trainer(SelfCompression(gamma=lambda step: asked.append(step) or 0.1, price=price)).fit(Gan(), batches(3))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert len(evaluated) == 2 * 6


@pytest.mark.parametrize("price", PRICES)
def test_evaluated_before_the_backward(price):
    """The staged gradient is that of the network before the backward pass; the loss is not touched."""
    seen = []

    class Look(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            (depths,) = compression._depths._optimizers
            seen.append((depths._staged, PRICES[price].of(pl_module).pulls(0.5), loss.item(), pl_module.losses[-1]))

    compression = SelfCompression(gamma=0.5, price=price)
    make_trainer(compression, Look()).fit(Lit(), batches(3))
    assert len(seen) == 3
    for staged, expected, loss, own in seen:
        for a, b in zip(staged, expected, strict=True):
            assert torch.equal(a.depth, b.depth)
            assert price == "bits" or torch.equal(a.exponent, b.exponent)
        assert loss == own


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_loss_and_size_loss_are_logged(settings, price):
    """The loss of the last backward pass, as the module made it, and gamma times the price beside it."""
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.5, price=price), log_every_n_steps=1, **settings)
    trainer.fit(model, batches())
    known = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert known["selfcompress/loss"] == pytest.approx(model.losses[-1], rel=1e-2 if "precision" in settings else 1e-6)
    assert known["selfcompress/gamma"] == 0.5
    assert known["selfcompress/size_loss"] == pytest.approx(0.5 * float(PRICES[price].of(model).bits_per_weight()))
    assert known["selfcompress/bits_per_weight"] == pytest.approx(float(ModelSize.of(model).bits_per_weight()))
    assert known["selfcompress/percent_of_float"] == pytest.approx(
        100 * size_report(model).nbytes / size_report(model).float_nbytes
    )


class Copies(pl.Callback):
    """Copies and pickles the callback at every hook of a fit."""

    def __init__(self, compression):
        self.compression, self.copies = compression, []

    def copy(self, *_, **__):
        self.copies = [copy.deepcopy(self.compression), pickle.loads(pickle.dumps(self.compression))]

    setup = on_fit_start = on_train_start = on_train_batch_start = on_train_batch_end = copy
    on_train_epoch_end = on_validation_epoch_end = on_fit_end = teardown = copy


def test_callback_is_copied_at_any_time():
    """A copy or a pickle of the callback, made at any hook, has its arguments and trains another network."""
    compression = SelfCompression(gamma=0.01, bits_lr=0.02, skip=["net.6"], round_to=2)
    copies = Copies(compression)
    model = Lit()
    make_trainer(compression, copies, Kill(SCHEDULE), max_epochs=1).fit(model, data(torch.float32), batches(2))
    for copied in copies.copies:
        assert (copied.gamma, copied.bits_lr, copied.skip, copied.round_to) == (0.01, 0.02, ("net.6",), 2)
        again = Lit()
        make_trainer(copied).fit(again, batches(2))
        assert again.net[0].bit_depth.max() < 8.1
    assert model.net[4].out_features == 14


def test_copy_in_the_middle_leaves_the_original_alone():
    """A fit whose callback is copied after every batch has the losses of one that is left alone."""

    def losses(*callbacks):
        torch.manual_seed(1)
        model, compression = Lit(), SelfCompression(gamma=0.05)
        trainer = make_trainer(compression, *[make(compression) for make in callbacks], Kill(SCHEDULE), max_epochs=2)
        trainer.fit(model, data(torch.float32))
        return model.losses

    assert losses(Copies) == losses()
