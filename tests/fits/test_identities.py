"""What holds a network's parameters goes on as with the float network: before, during and after removals."""

import copy
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from compressing import assert_shrunk, compress
from fits import SCHEDULE, Kill, data, fit
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from networks import Lit, batches, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.parameters import learned_tensors, quantized_parameters


def depths_of(model):
    return torch.cat([p.raw_depth.detach() for p in quantized_parameters(model)])


class Listed(Lit):
    """Keeps lists, a closure and hooks of its parameters from the start."""

    def __init__(self):
        super().__init__()
        self.everything = list(self.parameters())
        self.named = dict(self.named_parameters())
        weight = self.net[4].weight
        self.norm = lambda: weight.detach().norm()
        self.calls = Counter()
        weight.register_hook(lambda gradient: self.calls.update([("gradient", self.current_epoch)]))
        weight.register_post_accumulate_grad_hook(lambda p: self.calls.update([("accumulated", self.current_epoch)]))


def test_lists_closures_and_hooks_follow():
    """After removals a list of parameters is still that of the module, in order, and hooks are called as before."""
    model, trainer = compress(make=Listed)
    assert_shrunk(model, trainer)
    now = list(model.parameters())
    assert len(now) == len(model.everything)
    assert all(a is b for a, b in zip(now, model.everything, strict=True))
    assert all(model.named[name] is p for name, p in model.named_parameters())
    assert model.norm() == model.net[4].latent("weight").norm()
    assert model.calls == {(kind, epoch): 60 for kind in ("gradient", "accumulated") for epoch in (0, 1)}


class Same(pl.Callback):
    """Compares the list of parameters at every hook of a training with that of the float network."""

    def __init__(self, model):
        self.expected = [(name, p) for name, p in model.named_parameters()]
        self.compared = 0

    def compare(self, trainer, pl_module, *_, **__):
        assert [name for name, _ in pl_module.named_parameters()] == [name for name, _ in self.expected]
        assert all(a is b for a, (_, b) in zip(pl_module.parameters(), self.expected, strict=True))
        self.compared += 1

    setup = on_fit_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_fit_end = compare


@pytest.mark.parametrize("first", [True, False])
def test_parameters_are_the_float_networks_at_every_hook(first):
    """The same objects in the same order, from setup to the end of fit, before and after the callback's own hooks."""
    torch.manual_seed(1)
    model = Lit()
    same, compression = Same(model), SelfCompression(gamma=0.01)
    callbacks = [same, compression] if first else [compression, same]
    make_trainer(*callbacks, Kill(), max_epochs=2).fit(model, data(torch.float32))
    assert model.net[0].out_channels == 3
    assert same.compared > 200


class Clamped(Lit):
    """A WGAN's clamp of all parameters."""

    def on_train_batch_end(self, *_):
        for p in self.parameters():
            p.data.clamp_(-0.05, 0.05)


class Penalized(Lit):
    """Two penalties over all parameters."""

    def loss(self, batch):
        l2 = sum((p**2).sum() for p in self.parameters())
        l1 = sum(p.abs().sum() for p in self.parameters())
        return super().loss(batch) + 1e-3 * l2 + 1e-4 * l1


class MinGpt(Lit):
    """Sorts all parameters into two groups and asserts that none is left out, as minGPT does."""

    def configure_optimizers(self):
        decay = {n for n, p in self.named_parameters() if p.dim() > 1}
        rest = {n for n, p in self.named_parameters() if n.endswith("bias") or "net.1" in n}
        parameters = dict(self.named_parameters())
        assert not decay & rest
        assert decay | rest == parameters.keys()
        groups = [{"params": [parameters[n] for n in sorted(names)]} for names in (decay, rest)]
        return torch.optim.AdamW(groups, lr=1e-3)


class Clipped(Lit):
    """Clips the norm of all gradients by hand, and counts what was clipped."""

    def on_before_optimizer_step(self, optimizer):
        with_gradients = [p for p in self.parameters() if p.grad is not None]
        assert len(with_gradients) == len(list(Lit().parameters()))
        nn.utils.clip_grad_norm_(self.parameters(), 1e-4)


class ByAttribute(Lit):
    """Names its parameters one by one, as attributes of layers."""

    def configure_optimizers(self):
        named = [self.net[i] for i in (0, 1, 4, 6)]
        return torch.optim.SGD([t for layer in named for t in (layer.weight, layer.bias)], lr=1e-3)


@pytest.mark.parametrize("make", [Clamped, Penalized, MinGpt, Clipped, ByAttribute])
def test_code_over_all_parameters(make):
    """Code over all parameters does no harm to depths, and hinders no removal."""
    model, trainer = compress(make=make)
    assert_shrunk(model, trainer)
    assert float(depths_of(model).min()) > 5  # from 8, under gamma's price alone


@pytest.mark.parametrize("penalty", [lambda p: (p**2).sum(), lambda p: p.abs().mean(), lambda p: p.norm()])
def test_penalties_move_no_depth(penalty):
    """Where a penalty on all parameters is the whole loss, depths have no gradient and stay where they are."""

    class Only(Lit):
        def loss(self, batch):
            return 0.0 * super().loss(batch) + sum(penalty(p) for p in self.parameters())

    model = Only()
    make_trainer(SelfCompression(gamma=0.0)).fit(model, batches())
    assert torch.equal(depths_of(model), torch.full_like(depths_of(model), 8.0))


class Steps(torch.optim.Optimizer):
    """An optimizer that makes the steps of another one, which holds the same parameters (as SAM, Lookahead)."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.inner = torch.optim.Adam(self.param_groups, lr=1e-3)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.inner.step()
        return loss


def test_optimizer_within_an_optimizer_holds_the_smaller_parameters():
    """The inner optimizer, which the Trainer does not know, still holds the module's own parameters, and steps them."""

    class Inner(Lit):
        def configure_optimizers(self):
            self.optimizer = Steps(self.parameters())
            return self.optimizer

    model = Inner()
    make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0), Kill({0: {"net.4": [2]}}), max_epochs=1).fit(
        model, data(torch.float32)
    )
    assert model.net[4].out_features == 15
    held = [p for group in model.optimizer.inner.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


class Hoarder(Lit):
    """Keeps the losses of a whole epoch with their graphs, which were recorded with the old shapes."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx > 50 and self.current_epoch == 0:
            self.kept.append(loss)
        return loss

    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            self.kept.clear()


def test_a_graph_of_the_old_shape_is_told_once():
    """Where losses are kept with their graphs, new parameters take the old ones' places, and training goes on."""
    with pytest.warns(UserWarning, match="had to be replaced by new parameters") as told:
        model, _ = fit(1, make=Hoarder)
    assert sum("had to be replaced" in str(w.message) for w in told) == 1
    free, _ = fit(1)
    assert model.net[0].out_channels == 3
    assert model.losses == pytest.approx(free.losses, rel=1e-12)


@pytest.mark.parametrize("keep", ["loss", "output"])
def test_training_with_held_graphs_is_the_same_training(keep):
    """The losses with replaced parameters are those of a fit in which nobody keeps a graph."""

    class Holding(Lit):
        def __init__(self):
            super().__init__()
            self.kept = []

        def loss(self, batch):
            out = self.net(batch[0])
            loss = nn.functional.cross_entropy(out, batch[1])
            self.kept = [loss if keep == "loss" else out]
            return loss

    held, _ = fit(1, make=Holding, schedule=SCHEDULE)
    free, _ = fit(1, schedule=SCHEDULE)
    assert held.net[0].out_channels == 3
    assert held.losses == pytest.approx(free.losses, rel=1e-12)


def test_finetuning_callbacks_see_the_float_parameters():
    """BaseFinetuning freezes and unfreezes the module's own parameters, and depths are trained with them."""

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)

    model, trainer = compress(Unfreeze(), schedule={1: {"net.4": [0]}}, max_epochs=3)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(map(id, held)))
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert model.net[4].out_features == 15
    assert issubclass(BackboneFinetuning, BaseFinetuning)


def test_module_zero_grad_clears_depths():
    """Gradients that the module's own zero_grad throws away are thrown away for depths as well."""

    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(1e6 * self.loss(batch))  # thrown away
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            self.seen.append([t.grad.clone() for t in learned_tensors(self).values()])
            self.optimizers().step()

    torch.manual_seed(1)
    model, reference = Manual(), Manual()
    reference.load_state_dict(model.state_dict())
    make_trainer(SelfCompression(gamma=0.0, initial_bits=3, bits_lr=0.0)).fit(model, batches(1))
    reference.training_step = lambda batch, batch_idx: (
        reference.manual_backward(reference.loss(batch)),
        reference.seen.append([t.grad.clone() for t in learned_tensors(reference).values()]),
        reference.optimizers().step(),
    )[0]
    make_trainer(SelfCompression(gamma=0.0, initial_bits=3, bits_lr=0.0)).fit(reference, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.seen[0], reference.seen[0], strict=True))
    assert any(bool(g.any()) for g in model.seen[0])


def test_two_networks_zipped():
    """Two networks of one class, one compressed and one float, are zipped over their parameters."""
    model, other = Lit(), Lit()
    make_trainer(SelfCompression(gamma=0.01)).fit(model, batches())
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    assert all((a, p.shape) == (b, q.shape) for (a, p), (b, q) in pairs)


def test_copied_module_keeps_what_is_learned():
    """A deep copy of a module in training has depths and exponents of its own, with the same values."""
    model, _ = compress(schedule={0: {"net.4": [1]}})
    copied = copy.deepcopy(model)
    mine, its = learned_tensors(model), learned_tensors(copied)
    assert mine.keys().isdisjoint(its)
    assert all(torch.equal(a, b) for a, b in zip(mine.values(), its.values(), strict=True))
