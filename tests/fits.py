"""A whole fit in which channels die and leave, for the tests of what else a Trainer may hold."""

import torch
from networks import Lit, make_trainer
from test_removal_fit import Kill, assert_only_living, data

from lightning_selfcompress import SelfCompression


def compress(*callbacks, first=(), make=Lit, train=None, val=None, ckpt_path=None, **settings):
    """Two epochs of 60 steps; the callbacks in ``first`` are listed before SelfCompression, the others after it."""
    torch.manual_seed(1)
    model = make()
    trainer = make_trainer(*first, SelfCompression(gamma=0.01), *callbacks, Kill(), **({"max_epochs": 2} | settings))
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
