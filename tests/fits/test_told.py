"""Trainings in which bit depths cannot be trained as they are: they say so, once, with what to do."""

import warnings

import pytest
import torch
from networks import Lit, batches, make_trainer
from optimizers import Lookahead, Sam
from torch import nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.parameters import quantized_parameters


def depths_of(model):
    return torch.cat([p.raw_depth.detach() for p in quantized_parameters(model)])


def fit(model, loader=None, **arguments):
    torch.manual_seed(1)
    compression = SelfCompression(**({"gamma": 1.0, "bits_lr": 0.03} | arguments))
    trainer = make_trainer(compression, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, batches() if loader is None else loader)
    return [str(w.message) for w in caught if "SelfCompression:" in str(w.message)], trainer


@pytest.mark.parametrize("gamma", [1e300, lambda step: 1e200])
def test_gamma_that_no_float_holds(gamma):
    """A gamma whose gradient is infinite is told of once, with the number of steps left out."""
    told, _ = fit(Lit(), gamma=gamma)
    assert len(told) == 1
    assert "makes the size's gradient infinite" in told[0]
    assert "8 so far" in told[0]


@pytest.mark.parametrize("price", ["bytes", "bits"])
@pytest.mark.parametrize("every", [0, 1])
def test_all_channels_dead(every, price):
    """A network without a living channel is told of once, whether or not channels are removed."""
    arguments = {"bits_lr": 5.0, "gamma": 100.0, "cooldown": 0.0, "prune_every_n_epochs": every, "price": price}
    told, _ = fit(Lit(), batches(30, 4), **arguments)
    assert len(told) == 1
    assert "all channels are dead" in told[0]


class Hidden(torch.optim.Optimizer):
    """Updates parameters in a method of another name."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def update(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(0.01 * p.grad)
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError


class ByHand(Lit):
    def __init__(self, make):
        super().__init__()
        self.automatic_optimization = False
        self.make = make

    def configure_optimizers(self):
        return self.make(self.net.parameters())

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers().optimizer
        if isinstance(optimizer, Hidden):
            self.manual_backward(self.loss(batch))
            optimizer.update()
            return
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()


def test_depths_step_with_an_optimizer_inside():
    """Depths step once with each step of the optimizer inside another one."""
    model = ByHand(lambda params: Sam(params, lambda groups: torch.optim.SGD(groups, lr=0.01)))
    told, trainer = fit(model, gamma=50.0, price="bits")
    assert not told
    assert float(depths_of(model).max()) < 8
    (compression,) = [c for c in trainer.callbacks if isinstance(c, SelfCompression)]
    (own,) = compression._depths._optimizers
    assert {int(state["step"]) for state in own.adam.state.values()} == {3 * 8}


def test_depths_step_once_where_both_step():
    """A step of the outer optimizer and of the inner one within it are one step of depths."""
    model = Lit(lambda m: Lookahead(torch.optim.Adam(m.parameters(), lr=1e-3)))
    told, trainer = fit(model, gamma=50.0)
    assert not told
    (compression,) = [c for c in trainer.callbacks if isinstance(c, SelfCompression)]
    (own,) = compression._depths._optimizers
    assert {int(state["step"]) for state in own.adam.state.values()} == {3 * 8}


def test_optimizer_whose_steps_are_not_seen():
    """Where gradients of depths arrive but no step is seen, a warning after the first epoch names the optimizer."""
    model = ByHand(Hidden)
    told, _ = fit(model)
    assert len(told) == 1
    assert "Hidden has given bit depths gradients, but no step" in told[0]
    assert float(depths_of(model).min()) == 8


class Partly(Lit):
    """Two heads, one of which no optimizer holds until the second epoch."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Linear(16, 4)

    def loss(self, batch):
        hidden = self.net[:6](batch[0])
        return nn.functional.cross_entropy(self.net[6](hidden) + self.aside(hidden), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01)

    def on_train_epoch_start(self):
        self.depths = {**getattr(self, "depths", {}), self.current_epoch: self.aside.bit_depth.detach().clone()}
        if self.current_epoch == 1:
            self.optimizers().add_param_group({"params": list(self.aside.parameters())})


def test_weights_without_an_optimizer_keep_their_depths(caplog):
    """Depths of weights that no optimizer holds stay, which is told once, and move as soon as one holds them."""
    model = Partly()
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model, gamma=50.0, price="bits")
    assert model.depths[1].tolist() == [8.0] * 4
    assert float(model.depths[2].max()) < 8
    told = [r.getMessage() for r in caplog.records if "no optimizer holds" in r.getMessage()]
    assert len(told) == 1
    assert "aside.weight" in told[0]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("write", [nn.init.ones_, lambda weight: weight.data.fill_(1.0)], ids=["nn.init", "data"])
def test_initialization_when_a_fit_starts(hook, write):
    """Weights that a module initializes when its fit starts are those that are trained."""

    class Initialized(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Initialized()
    setattr(Initialized, hook, lambda self: write(self.net[4].weight))
    told, _ = fit(model, bits_lr=0.0)
    assert torch.allclose(model.net[4].weight, torch.ones(()), atol=0.02)
    assert not told


def test_initialization_of_a_resumed_fit_is_lost_with_a_warning(tmp_path):
    """A resumed network was trained already: what is written into its weights is lost, and told."""

    class Late(Lit):
        late = False

        def on_fit_start(self):
            if self.late:
                nn.init.ones_(self.net[4].weight)

    first, second = Late(), Late()
    _, trainer = fit(first)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second.late = True
    trainer = make_trainer(SelfCompression(gamma=1.0, bits_lr=0.03), max_epochs=4)
    with pytest.warns(UserWarning, match=r"wrote into the quantized 'weight'.*latent"):
        trainer.fit(second, batches(), ckpt_path=tmp_path / "end.ckpt")
    assert float(second.net[4].weight.detach().abs().mean()) < 0.5


def test_writes_into_frozen_weights_after_training_began():
    """Once a batch was trained, a write into a frozen weight is lost with a warning as into any other."""

    class Frozen(Lit):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                nn.init.ones_(self.net[0].weight)

    model = Frozen()
    before = model.net[0].weight.detach().clone()
    trainer = make_trainer(SelfCompression(gamma=1.0, bits_lr=0.03), max_epochs=2)
    with pytest.warns(UserWarning, match=r"wrote into the quantized 'weight'.*latent"):
        trainer.fit(model, batches())
    assert torch.equal(model.net[0].latent("weight"), before)
