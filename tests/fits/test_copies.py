"""Copies of a network beside it: averages, target networks, shadows, snapshots."""

import copy

import pytest
import torch
from fits import Kill, data
from networks import Lit, make_trainer, small_net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.removal.copies import Copies

SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}


def fit(model, *callbacks, max_epochs=3, schedule=SCHEDULE, **settings):
    torch.manual_seed(1)
    compression = SelfCompression(gamma=0.0, bits_lr=0.0)
    trainer = make_trainer(compression, *callbacks, Kill(schedule), max_epochs=max_epochs, **settings)
    trainer.fit(model, data(torch.float32))
    return trainer


def widths(net):
    return net[0].out_channels, net[4].out_features


def shapes(net):
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


class Averaged(Lit):
    """Keeps an average of its parameters, each at its place, from some epoch on."""

    begin = 0

    def __init__(self, frozen=True):
        super().__init__()
        self.mean = copy.deepcopy(self.net).requires_grad_(not frozen)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        if self.current_epoch >= self.begin:
            for mean, new in zip(self.mean.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(new, 0.5)
            for mean, new in zip(self.mean.buffers(), self.net.buffers(), strict=True):
                mean.copy_(new)


@pytest.mark.parametrize("frozen", [True, False])
def test_average_shrinks_along(frozen, caplog):
    """An average that is updated by position loses the channels of its network, which is told once."""
    model = Averaged(frozen)
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model)
    assert widths(model.net) == (4, 13)
    assert shapes(model.mean) == shapes(model.net)
    told = [r.getMessage() for r in caplog.records if "'mean' is a copy of 'net'" in r.getMessage()]
    assert len(told) == 1
    images = next(iter(data(torch.float32)))[0]
    assert model.mean.eval()(images).shape == (4, 4)


def test_average_that_begins_late():
    """Channels wait for an average whose first update comes after the first removal would have been."""
    model = Averaged()
    model.begin = 2
    fit(model, max_epochs=4)
    assert shapes(model.mean) == shapes(model.net)
    assert widths(model.net) == (4, 13)


class OfParameters(Averaged):
    """Averages its parameters alone, as most code does; the depths of the average are buffers."""

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for mean, new in zip(self.mean.parameters(), self.net.parameters(), strict=True):
            mean.mul_(0.9).add_(new, alpha=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_depths_of_an_average_of_parameters_follow(frozen):
    """An average of parameters alone has the bit depths of its network, and loses channels along."""
    model = OfParameters(frozen)
    fit(model, max_epochs=4)
    assert shapes(model.mean) == shapes(model.net)
    assert widths(model.net) == (4, 13)
    assert torch.equal(model.mean[4].bit_depth, model.net[4].bit_depth)


@pytest.mark.parametrize("how", ["gone", "of the first width"])
def test_average_that_leaves(how):
    """A fit goes on whose average is taken away while it trains, or gets a state of another width."""

    class Leaves(OfParameters):
        def __init__(self):
            super().__init__()
            self.first = None

        def on_train_batch_end(self, *args):
            if self.current_epoch < 2:
                super().on_train_batch_end(*args)
            if self.global_step == 1:
                self.first = {name: t.clone() for name, t in self.mean.state_dict().items()}
            if self.current_epoch == 2 and self.mean is not None:
                if how == "gone":
                    self.mean = None
                else:
                    self.mean.load_state_dict(self.first)

    model = Leaves()
    fit(model, max_epochs=4)
    assert widths(model.net) == (4, 13)
    assert model.mean is None or widths(model.mean) == (6, 16)


def test_copies_are_looked_for_where_something_is_new(monkeypatch):
    """Batches that show nothing new cost no search for copies: it comes with watched steps and removals alone."""
    calls = []
    note = Copies.note
    monkeypatch.setattr(Copies, "note", lambda self, *args: calls.append(1) or note(self, *args))
    fit(Averaged())
    assert 3 <= len(calls) <= 9 + 3 + 4  # of 180 batches: nine of the first epoch are watched, and three later


class Online(Lit):
    """Learns the outputs of a target network, into which its weights are copied every 45 steps."""

    def __init__(self, how):
        super().__init__()
        self.target = copy.deepcopy(self.net)
        self.how = how

    def loss(self, batch):
        with torch.no_grad():
            wanted = self.target(batch[0]).softmax(-1)
        return super().loss(batch) + nn.functional.cross_entropy(self.net(batch[0]), wanted)

    def on_train_batch_end(self, *_):
        if self.global_step % 45:
            return
        if self.how == "load":
            self.target.load_state_dict(self.net.state_dict())
        elif self.how == "layers":
            for one, other in zip(self.target, self.net, strict=True):
                one.load_state_dict(other.state_dict())
        else:
            with torch.no_grad():
                for one, other in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    one.copy_(other)


@pytest.mark.parametrize("how", ["load", "layers", "by position"])
def test_target_network(how):
    """A target network that the step runs is synced however its module does it."""
    model = Online(how)
    fit(model, max_epochs=4)
    assert widths(model.net)[0] == 4
    assert shapes(model.target) == shapes(model.net)


def test_loading_into_a_teacher_of_other_width():
    """A part with values of its own takes the shapes of a state dict of the trained part."""

    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.best = small_net().requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.best.load_state_dict(self.net.state_dict())

    model = Late()
    fit(model)
    assert widths(model.net) == widths(model.best) == (4, 13)


class Shadows(Lit):
    """Keeps averages of its weights where no module owns them."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        means = [p.detach().clone() for p in self.net.parameters()]
        if where == "a list":
            self.means = means
        elif where == "a dictionary":
            self.means = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        elif where == "an object":
            self.average = Average(means)
        else:
            for i, mean in enumerate(means):
                self.register_buffer(f"mean_{i}", mean)

    def shadows(self):
        if self.where == "a list":
            return self.means
        if self.where == "a dictionary":
            return list(self.means.values())
        if self.where == "an object":
            return self.average.means
        return [t for name, t in self.named_buffers(recurse=False) if name.startswith("mean_")]

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for mean, new in zip(self.shadows(), self.net.parameters(), strict=True):
            mean.lerp_(new, 0.1)


class Average:
    def __init__(self, means):
        self.means = means


@pytest.mark.parametrize("where", ["a list", "a dictionary", "an object", "buffers"])
def test_shadows_pin(where, caplog):
    """Weights of which somebody keeps a tensor of the same shape stay, with the place of that tensor as the reason."""
    model = Shadows(where)
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model)
    assert widths(model.net) == (6, 16)
    place = {"an object": "average.means", "buffers": "mean_"}.get(where, "means")
    told = [r.getMessage() for r in caplog.records if "holds a tensor of its shape" in r.getMessage()]
    assert told
    assert all(place in line for line in told)


def test_late_shadow_in_a_list():
    """Channels wait for a list of equal tensors into which weights are copied in the last epoch for the first time."""

    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.first = [copy.deepcopy(self.net)]
            self.drift = []

        def on_train_batch_end(self, *_):
            if self.current_epoch == 2:
                pairs = zip(self.first[0].parameters(), self.net.parameters(), strict=True)
                self.drift.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    model = Late()
    fit(model)
    assert len(model.drift) == 60
    assert widths(model.net) == (4, 13)


def test_copies_of_a_callback_pin():
    """A callback of the user's that keeps a deep copy and averages into it goes on."""
    import lightning.pytorch as pl

    class Keeper(pl.Callback):
        def on_fit_start(self, trainer, module):
            self.copied = copy.deepcopy(module.net)

        @torch.no_grad()
        def on_train_batch_end(self, trainer, module, *_):
            for mean, new in zip(self.copied.parameters(), module.net.parameters(), strict=True):
                mean.lerp_(new, 0.1)

    keeper, model = Keeper(), Lit()
    fit(model, keeper)
    assert shapes(keeper.copied) == shapes(model.net)


@pytest.mark.parametrize("make", [Averaged, OfParameters])
def test_resumed_average(make, tmp_path):
    """A run resumed from a checkpoint ends as the straight one, in the network and in its average, to the bit."""
    torch.manual_seed(0)
    straight = make()
    first, second = copy.deepcopy(straight), make()
    schedule = {**SCHEDULE, 1: {"net.0": [0]}}
    fit(straight, schedule=schedule)
    fit(first, schedule=schedule, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    torch.manual_seed(1)
    trainer = make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0), Kill(schedule), max_epochs=3)
    trainer.fit(second, data(torch.float32), ckpt_path=tmp_path / "first.ckpt")
    assert shapes(second) == shapes(straight)
    for name, t in straight.state_dict().items():
        assert torch.equal(t, second.state_dict()[name]), name


@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_model(buffers):
    """Torch's AveragedModel goes on after a removal, with averaged buffers and without."""

    class M(Lit):
        def __init__(self):
            super().__init__()
            self.mean = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)

        def on_train_batch_end(self, *_):
            self.mean.update_parameters(self.net)

    model = M()
    fit(model)
    assert shapes(model.mean.module) == shapes(model.net)
    if not buffers:  # then depths are copied, and die along
        assert widths(model.net) == (4, 13)


def test_part_added_in_training():
    """A snapshot made in the second epoch teaches from then on, at the width that it has."""

    class Snapshot(Lit):
        def __init__(self):
            super().__init__()
            self.teacher = None

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()

        def loss(self, batch):
            loss = super().loss(batch)
            if self.teacher is not None:
                loss = loss + nn.functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]))
            return loss

    model = Snapshot()
    fit(model, schedule={0: {"net.0": [1, 4]}, 1: {"net.4": [0, 7]}})
    assert widths(model.teacher) == (4, 16)
    assert widths(model.net) == (4, 14)


@pytest.mark.parametrize("run", [True, False])
def test_teacher_with_values_of_its_own(run):
    """A frozen network of the same kind that nobody writes to keeps its width, and holds up nothing."""

    class Taught(Lit):
        def __init__(self):
            super().__init__()
            self.teacher = small_net().requires_grad_(False).eval()

        def loss(self, batch):
            soft = self.teacher(batch[0]).softmax(-1) if run else torch.full((len(batch[0]), 4), 0.25)
            return super().loss(batch) + nn.functional.cross_entropy(self.net(batch[0]), soft)

    model = Taught()
    fit(model)
    assert (widths(model.net), widths(model.teacher)) == ((4, 13), (6, 16))
