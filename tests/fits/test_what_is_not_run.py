"""Networks that no watched step runs, and batches that prove nothing."""

import copy

import pytest
import torch
from fits import Kill, data
from networks import Lit, make_trainer, small_net
from torch import nn
from torch.utils.data import DataLoader

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.parameters import quantized_parameters


def fit(model, loader=None, schedule=None, **settings):
    torch.manual_seed(1)
    callbacks = [SelfCompression(gamma=0.0, bits_lr=0.0), Kill() if schedule is None else Kill(schedule)]
    trainer = make_trainer(*callbacks, **({"max_epochs": 2} | settings))
    trainer.fit(model, data(torch.float32) if loader is None else loader)
    return trainer


class WithTeacher(Lit):
    """A frozen copy of the network that no training step runs."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


class WithStage(Lit):
    """A frozen second stage with a recurrent layer, an embedding and weights of its own."""

    def __init__(self):
        super().__init__()
        self.stage = nn.ModuleDict(
            {"embed": nn.Embedding(9, 6), "mix": nn.Linear(6, 8), "read": nn.GRU(8, 5), "out": nn.Linear(5, 2)}
        ).requires_grad_(False)


class InTheStep(Lit):
    """A frozen copy that the step does run."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch):
        with torch.no_grad():
            soft = self.teacher(batch[0]).softmax(-1)
        return super().loss(batch) + nn.functional.cross_entropy(self.net(batch[0]), soft)


@pytest.mark.parametrize(
    ("make", "layers"),
    [(WithTeacher, ["teacher.0", "teacher.4"]), (WithStage, ["stage.mix", "stage.embed"])],
)
def test_what_no_step_runs_stays(make, layers, caplog):
    """Dead channels of a frozen network that no watched step runs stay, with its outputs, and are told of once."""
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(layers[0].split(".")[0])}
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model, schedule={0: {layer: [1, 3] for layer in layers} | {"net.0": [1, 4]}})
    assert model.net[0].out_channels == 4
    after = model.state_dict()
    assert all(after[name].shape == t.shape for name, t in before.items())
    told = [r.getMessage() for r in caplog.records if "no step that was watched runs it" in r.getMessage()]
    assert len(told) == len(set(told)) == len(layers)


def test_what_a_step_runs_frozen_goes():
    """Dead channels of a frozen network that the step runs leave as others do."""
    model = InTheStep()
    fit(model, schedule={0: {"teacher.0": [2], "net.0": [1, 4]}})
    assert (model.teacher[0].out_channels, model.net[0].out_channels) == (5, 4)


@pytest.mark.parametrize("make", [WithTeacher, WithStage])
def test_resumed_what_no_step_runs_stays(make, tmp_path):
    """A resumed run knows what no step had run, and ends as the straight one, to the bit."""
    schedule = {0: {"net.0": [1]}, 1: {"net.4": [2]}}
    straight = make()
    fit(straight, schedule=schedule).save_checkpoint(tmp_path / "end.ckpt")
    first, second = make(), make()
    fit(first, schedule=schedule, max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    torch.manual_seed(1)
    trainer = make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0), Kill(schedule), max_epochs=2)
    trainer.fit(second, data(torch.float32), ckpt_path=tmp_path / "first.ckpt")
    assert [p.channels for p in quantized_parameters(second)] == [p.channels for p in quantized_parameters(straight)]


def first(value):
    """An epoch whose first batch is this."""
    rows = list(data(torch.float32))
    return DataLoader([value(rows[0]), *rows[1:]], batch_size=None)


NOTHING = {
    "all NaN": lambda batch: [torch.full_like(batch[0], torch.nan), batch[1]],
    "all infinite": lambda batch: [torch.full_like(batch[0], torch.inf), batch[1]],
    "without samples": lambda batch: [batch[0][:0], batch[1][:0]],
}


class Guarded(Lit):
    """Keeps gradients that are not finite from its weights; its width is a number in the code."""

    scale = 6.0

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def loss(self, batch):
        hidden = self.net[:3](batch[0])
        return nn.functional.cross_entropy(self.net[3:](hidden * (self.scale / hidden.shape[1])), batch[1])

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", NOTHING)
def test_batches_that_prove_nothing(kind):
    """A first batch that proves nothing is passed over: what a later one refutes stays."""
    model = Guarded()
    fit(model, first(NOTHING[kind]), schedule={0: {"net.0": [1, 4], "net.4": [0]}})
    assert model.net[0].out_channels == 6
    assert model.net[4].out_features == 15


@pytest.mark.parametrize("kind", NOTHING)
def test_the_next_batch_proves(kind):
    """Removal is not given up for a first batch that proves nothing: the next one proves it."""

    class Counting(Guarded):
        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    model = Counting()
    fit(model, first(NOTHING[kind]))
    assert_smaller(model)


def assert_smaller(model):
    assert (model.net[0].out_channels, model.net[4].out_features) == (3, 12)


def test_missing_values_prove_as_others_do():
    """Batches with some numbers that are not finite, which the module fills in, prove a removal."""

    class Filling(Lit):
        def loss(self, batch):
            return super().loss((batch[0].nan_to_num(0.0), batch[1]))

    rows = [[x.masked_fill(x > 1, torch.nan), y] for x, y in data(torch.float32)]
    model = Filling()
    fit(model, DataLoader(rows, batch_size=None))
    assert_smaller(model)
