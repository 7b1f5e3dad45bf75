"""A small network after a fit that removed channels."""

import torch
from fits import SCHEDULE, Kill
from networks import Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression

DATA = {"n": 60, "size": 4}


def trained(make=Lit, *callbacks, schedule=SCHEDULE, compression=None, epochs=2, **kwargs):
    torch.manual_seed(1)
    model = make()
    compression = compression or SelfCompression(gamma=0.05)
    trainer = make_trainer(compression, Kill(schedule), *callbacks, max_epochs=epochs, **kwargs)
    trainer.fit(model, batches(**DATA), batches(2))
    return model.eval(), trainer
