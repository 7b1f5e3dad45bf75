"""What a module does outside the training step that was watched first: it goes on as before, with the same numbers."""

import copy
import random

import lightning.pytorch as pl
import pytest
import torch
from fits import Kill, data
from killing import kill, watched
from networks import Lit, make_trainer, small_net
from torch import nn
from torch.utils.data import DataLoader
from zoo import ZOO

from lightning_selfcompress import SelfCompression, convert

SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}


def fit(model, *callbacks, schedule=SCHEDULE, every=1, val=None, **settings):
    torch.manual_seed(1)
    compression = SelfCompression(gamma=0.0, bits_lr=0.0, prune_every_n_epochs=every)
    trainer = make_trainer(compression, *callbacks, Kill(schedule), **({"max_epochs": 3} | settings))
    trainer.fit(model, data(torch.float32), val)
    return trainer


def widths(net):
    return net[0].out_channels, net[4].out_features


class Centres(Lit):
    """Validates with the distances of its features to centres in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centres", torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))

    def validation_step(self, batch, batch_idx):
        self.log("distance", torch.cdist(self.net[:6](batch[0]), self.centres).mean())


class Probe(Lit):
    """Validates with a frozen probe on its features, which no training step runs."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(16, 3).requires_grad_(False)

    def validation_step(self, batch, batch_idx):
        self.log("probed", self.probe(self.net[:6](batch[0])).square().mean())


class Spread(Lit):
    """Validates with the standard deviation over features, as a number."""

    def validation_step(self, batch, batch_idx):
        self.log_dict({"spread": self.net[:6](batch[0]).std(1).mean().item()})


class Kept(Lit):
    """Keeps features of validation until its end."""

    def __init__(self):
        super().__init__()
        self.features = []

    def validation_step(self, batch, batch_idx):
        self.features.append(self.net[:6](batch[0]))

    def on_validation_epoch_end(self):
        self.log("kept", torch.cat(self.features).mean())
        self.features = []


class Hooked(Lit):
    """A forward hook keeps the activations of a layer, which validation reads."""

    def __init__(self):
        super().__init__()
        self.seen = {}
        self.net[5].register_forward_hook(lambda module, args, out: self.seen.update(hidden=out.detach()))

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("active", (self.seen["hidden"] > 0).float().mean())


class Embeds(Lit):
    """Trains on logits, and returns features from ``forward``, with which it validates."""

    def forward(self, images):
        return self.net[:6](images)

    def validation_step(self, batch, batch_idx):
        features = self(batch[0])
        self.log("norm", features.norm(dim=1).mean())
        self.log("mean", features.mean())


class TwoSets(Lit):
    """Two validation sets, of which the second one reads features."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        hidden = self.net[:6](batch[0])
        self.log("set", self.net[6](hidden).mean() if dataloader_idx == 0 else hidden.mean())


class Written(Lit):
    """Validates on a view whose width is a number in the code."""

    def validation_step(self, batch, batch_idx):
        self.log("pooled", self.net[:6](batch[0]).reshape(len(batch[0]), 4, -1).amax(2).mean())
        self.log("scaled", self.net[:6](batch[0]).sum(1).mean() / 16)


class Teacher(Lit):
    """Validates against a copy of itself that was frozen before training."""

    def __init__(self):
        super().__init__()
        self.first = copy.deepcopy(self.net).requires_grad_(False)

    def validation_step(self, batch, batch_idx):
        self.log("drift", (self.first[:6](batch[0]) - self.net[:6](batch[0])).square().mean())


class Counted(Lit):
    """Logs how many parameters it has, which a removal changes and should; and the loss."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))
        self.log("parameters", float(sum(p.numel() for p in self.net[2:3].parameters())))


MODULES = [Centres, Probe, Spread, Kept, Hooked, Embeds, TwoSets, Written, Teacher, Counted]


class Double(pl.LightningModule):
    pass


def numbers(make, every, val):
    torch.manual_seed(2)
    model = make()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    compression = SelfCompression(gamma=0.0, bits_lr=0.0, prune_every_n_epochs=every)
    trainer = make_trainer(compression, Dead(), max_epochs=2, precision="64-true")
    trainer.fit(model, data(torch.float64, 3), val)
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if "selfcompress" not in name}
    return metrics, model


class Dead(pl.Callback):
    """Kills some channels of the first and the second layer after the first step, with their constants."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 1:
            with torch.no_grad():
                for layer, channels in ((module.net[0], [1, 4]), (module.net[4], [0, 7, 15])):
                    layer.bit_depth[channels] = -1.0
                    layer.bias[channels] = 0.0
                    layer.forget_quantized()
                for vector in (module.net[1].weight, module.net[1].bias):
                    vector[[1, 4]] = 0.0


@pytest.mark.parametrize("make", MODULES)
def test_validation_keeps_its_numbers(make, caplog):
    """With removal on and off all validation metrics are the same; what has to stay for that is told."""
    val = data(torch.float64, 2)
    val = [val, data(torch.float64, 2)] if make is TwoSets else val
    off, model = numbers(make, 0, val)
    assert widths(model.net) == (6, 16)
    with caplog.at_level("INFO", "lightning_selfcompress"):
        on, model = numbers(make, 1, val)
    assert on == pytest.approx(off, rel=1e-10)
    assert widths(model.net)[0] == 4
    if widths(model.net)[1] == 16:
        assert any("dead in net.4 stay" in r.getMessage() for r in caplog.records)


EVERY_THIRD = sorted(ZOO)[::3]


@pytest.mark.parametrize(
    "name", [n if n in EVERY_THIRD else pytest.param(n, marks=pytest.mark.nightly) for n in sorted(ZOO)]
)
def test_validation_of_the_zoo(name):
    """A fit at learning rate 0 ends with the same validation metrics whether or not channels are removed."""
    entry = ZOO[name]

    class Any(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = entry.make()

        def step(self, batch):
            outputs = self.net(*batch)
            tensors = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            return [t for t in tensors if torch.is_tensor(t) and t.is_floating_point()]

        def training_step(self, batch, batch_idx):
            return sum(t.square().mean() for t in self.step(batch))

        def validation_step(self, batch, batch_idx):
            for i, t in enumerate(self.step(batch)):
                self.log(f"mean_{i}", t.mean(), batch_size=1)
                self.log(f"size_{i}", t.square().mean(), batch_size=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Half(pl.Callback):
        """Kills half of the channels, with their constants, after the first step."""

        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            if trainer.global_step == 1:
                net = copy.deepcopy(module.net)
                channels, _ = watched(net, *batch)
                chosen = channels.removable()
                chosen[1::2] = False
                kill(module.net, channels, chosen)

    found = []
    for every in (0, 1):
        torch.manual_seed(3)
        model = Any()
        batch = tuple(t.double() if t.is_floating_point() else t for t in entry.inputs())
        loader = DataLoader([batch], batch_size=None)
        compression = SelfCompression(gamma=0.0, bits_lr=0.0, prune_every_n_epochs=every)
        trainer = make_trainer(compression, Half(), max_epochs=2, precision="64-true")
        trainer.fit(model, loader, loader)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "selfcompress" not in k}
        found.append((metrics, sum(p.numel() for p in model.parameters())))
    (off, before), (on, after) = found
    assert on == pytest.approx(off, rel=1e-10, abs=1e-13)
    assert after < before


def test_steps_that_are_not_run_are_rehearsed():
    """What only predictions read stays: the step is tried on a copy, with the batch of another step."""

    class Predicts(Lit):
        def predict_step(self, batch, batch_idx):
            return self.net[:6](batch[0])

    model = Predicts()
    fit(model)
    assert widths(model.net) == (4, 16)


def test_forward_of_the_module_that_no_step_calls():
    """What ``forward`` returns stays, though no step calls it."""

    class Features(Lit):
        def forward(self, images):
            return self.net[:6](images)

    model = Features()
    fit(model)
    assert widths(model.net) == (4, 16)


def test_removal_waits_for_a_validation_that_is_to_come(caplog):
    """Where validation cannot be tried before, nothing goes until the first one has been seen."""

    class Late(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("mean", self.net[:6](batch["only here"]).mean())

        def on_train_epoch_start(self):
            self.seen = [*getattr(self, "seen", []), widths(self.net)]

    val = DataLoader([{"only here": x} for x, _ in data(torch.float32, 2)], batch_size=None)
    model = Late()
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model, val=val, check_val_every_n_epoch=2, num_sanity_val_steps=0, max_epochs=4)
    assert model.seen == [(6, 16), (6, 16), (4, 16), (4, 16)]
    told = [r.getMessage() for r in caplog.records if "the first validation" in r.getMessage()]
    assert len(told) == 2  # one for each layer


# Turns


class Turns(Lit):
    """Two heads take turns, as something says; the second one has the width of its input in its code."""

    def __init__(self, turn, every=2):
        super().__init__()
        self.other = nn.Linear(16, 4)
        self.turn, self.every, self.count = turn, every, 0

    def on_train_batch_end(self, *_):
        self.count += 1

    def second(self, batch_idx):
        numbers = {
            "the batch": batch_idx,
            "the step": self.global_step,
            "a counter": self.count,
            "the epoch": self.current_epoch,
        }
        if self.turn == "chance":
            return random.random() < 0.5
        return numbers[self.turn] % self.every == 1

    def training_step(self, batch, batch_idx):
        hidden = self.net[:6](batch[0])
        if self.second(batch_idx):
            hidden = self.other(hidden.reshape(-1, 16))
            return nn.functional.cross_entropy(hidden, batch[1])
        return nn.functional.cross_entropy(self.net[6](hidden), batch[1])


@pytest.mark.parametrize(
    ("turn", "every"),
    [
        pytest.param("the batch", 2, marks=pytest.mark.nightly),
        ("the batch", 3),
        pytest.param("the step", 2, marks=pytest.mark.nightly),
        ("the step", 5),
        ("a counter", 3),
        ("chance", 2),
        ("the epoch", 2),
    ],
)
def test_heads_that_take_turns(turn, every):
    """The fit ends; what one head has written in its code stays, and the rest goes."""
    random.seed(0)
    model = Turns(turn, every)
    fit(model, max_epochs=4)
    assert widths(model.net) == (4, 16)


def test_head_that_begins_in_the_last_epoch():
    """Channels that a head could read wait for it, as long as an epoch is to come; others go."""

    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 4)

        def loss(self, batch):
            loss = super().loss(batch)
            if self.current_epoch == 3:
                loss = loss + self.other(self.net[:6](batch[0])).square().mean()
            return loss

        def on_train_epoch_start(self):
            self.seen = [*getattr(self, "seen", []), widths(self.net)]

    model = Late()
    fit(model, max_epochs=4)
    assert model.seen[1:] == [(6, 16), (4, 16), (4, 16)] or model.seen[1:] == [(4, 16)] * 3
    assert widths(model.net) == (4, 13)


@pytest.mark.parametrize("unused", [lambda: nn.Linear(5, 7), lambda: nn.Linear(16, 3), lambda: nn.LayerNorm(11)])
def test_what_is_never_used_holds_up_nothing(unused):
    """A trainable part that no step runs keeps its own shape; at the end of the training everything dead is gone."""
    model = Lit()
    model.pooler = unused()
    shapes = [p.shape for p in model.pooler.parameters()]
    fit(model)
    assert widths(model.net) == (4, 13)
    assert [p.shape for p in model.pooler.parameters()] == shapes


# Ends of epochs


OUTSIDE: list = []


class Ends(Lit):
    """Uses features of an epoch with its own weights at the end of it; it keeps them outside itself."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def training_step(self, batch, batch_idx):
        OUTSIDE.append(self.net[0](batch[0]).detach())
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        again = self.net[1].eval()(OUTSIDE[-1])
        self.net[1].train()
        self.outputs.append((tuple(again.shape), widths(self.net)))
        OUTSIDE.clear()


def test_ends_of_epochs_see_the_widths_of_the_epoch():
    """The module's own ``on_train_epoch_end`` meets the network of its epoch; checkpoints after it the smaller one."""
    model = Ends()
    fit(model)
    assert model.outputs[0][1] == (6, 16)
    assert all(shape[1] == channels for shape, (channels, _) in model.outputs)
    assert "on_train_epoch_end" not in model.__dict__


def test_callbacks_at_ends_of_epochs_see_the_widths_of_the_epoch():
    """So do callbacks, wherever they stand in the Trainer's list."""
    seen = []

    class Watches(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append((trainer.current_epoch, widths(module.net)))

    model = Lit()
    fit(model, Watches())
    assert seen[0] == (0, (6, 16))
    assert seen[-1][1] == (4, 13)


def test_networks_made_by_small_net_are_what_these_tests_kill():
    """The channels that are killed here are those of the network they are killed in."""
    net = small_net()
    convert(net)
    assert widths(net) == (6, 16)
