"""A whole fit in which channels die and leave, for the tests of what else a Trainer may hold."""

import lightning.pytorch as pl
import torch
from fits import SCHEDULE, Kill, assert_only_living, data
from networks import Lit, make_trainer

from lightning_selfcompress import SelfCompression


def compress(*callbacks, first=(), make=Lit, train=None, val=None, ckpt_path=None, schedule=SCHEDULE, **settings):
    """Two epochs of 60 steps; the callbacks in ``first`` are listed before SelfCompression, the others after it."""
    torch.manual_seed(1)
    model = make()
    trainer = make_trainer(
        *first, SelfCompression(gamma=0.01), *callbacks, Kill(schedule), **({"max_epochs": 2} | settings)
    )
    trainer.fit(model, data(torch.float32) if train is None else train, val, ckpt_path=ckpt_path)
    return model, trainer


def assert_shrunk(model, trainer, channels=3, hidden=12):
    """The channels that were killed are gone, and so is everything that belonged to them."""
    assert (model.net[0].out_channels, model.net[1].num_features, model.net[4].in_features) == (
        channels,
        channels,
        36 * channels,
    )
    assert (model.net[4].out_features, model.net[6].in_features) == (hidden, hidden)
    assert_only_living(trainer, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Classifier(Lit):
    """Logs its accuracy in validation, and predicts."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


# which entries of a tensor belong to which channels, by the numbers they had at first
AXES = {
    "net.0": {0: "channels"},
    "net.1": {0: "channels"},
    "net.4.weight": {0: "hidden", 1: "flat"},
    "net.4": {0: "hidden"},
    "net.6.weight": {1: "hidden"},
}


def alive(epochs, axis):
    """Numbers of what is left after the removals of some epochs."""
    if axis == "flat":
        return [36 * n + i for n in alive(epochs, "channels") for i in range(36)]
    layer, count = ("net.0", 6) if axis == "channels" else ("net.4", 16)
    gone = {n for e in range(epochs) for n in SCHEDULE.get(e, {}).get(layer, ())}
    return [n for n in range(count) if n not in gone]


def survivors(state, epochs, removals):
    """A state after some epochs without what goes until all ``removals`` are done."""
    result = {}
    for name, tensor in state.items():
        layer = name.rpartition(".")[0]
        for dim, axis in AXES.get(name, AXES.get(layer, {})).items() if tensor.dim() else ():
            now, then = alive(epochs, axis), alive(removals, axis)
            tensor = tensor.index_select(dim, torch.tensor([now.index(n) for n in then]))
        result[name] = tensor
    return result


class Record(pl.Callback):
    """States of the module, with the number of removals before them."""

    def __init__(self, hook):
        self.states = []
        setattr(self, hook, self.record)

    def record(self, trainer, pl_module, *_):
        state = {name: t.detach().clone() for name, t in pl_module.state_dict().items()}
        self.states.append((trainer.current_epoch, state))
