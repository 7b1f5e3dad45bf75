"""Training steps that do what a replay might trip over: batches taken apart, odd attributes, training mode alone."""

import io
import socket
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compressing import assert_shrunk
from fits import Kill, data
from networks import Lit, make_trainer, small_net
from torch import nn
from torch.utils.data import DataLoader

from lightning_selfcompress import SelfCompression, finalize, size_report
from lightning_selfcompress.channels.channels import Channels, Slot

Pair = namedtuple("Pair", "images labels")


@dataclass
class Sample:
    images: torch.Tensor
    labels: torch.Tensor


class Fields(dict):
    """A batch class whose constructor wants something else."""

    def __init__(self, source):
        super().__init__()
        self.source = source


def fields(images, labels):
    made = Fields("a file")
    made.update(images=images, labels=labels)
    return made


def popped(batch):
    return batch.pop("images"), batch.pop("labels")


SHAPES = {
    "a dictionary that is emptied": (lambda x, y: {"images": x, "labels": y}, popped),
    "an ordered dictionary that is emptied": (lambda x, y: OrderedDict(images=x, labels=y), popped),
    "a class of dictionaries that is emptied": (fields, popped),
    "a list that is emptied": (lambda x, y: [y, x], lambda batch: (batch.pop(), batch.pop())),
    "a named tuple": (Pair, tuple),
    "a dataclass": (Sample, lambda batch: (batch.images, batch.labels)),
    "lists in a dictionary": (lambda x, y: {"in": [x, [y]]}, lambda batch: (batch["in"][0], batch["in"][1].pop())),
}


def train(model, loader=None, *callbacks, **settings):
    torch.manual_seed(1)
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), *callbacks, **({"max_epochs": 2} | settings))
    trainer.fit(model, data(torch.float32) if loader is None else loader)
    return trainer


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_taken_apart(shape):
    """Whatever a step does to the containers of its batch, removal has the batch as it came."""
    make, take = SHAPES[shape]

    class Taking(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(take(batch), batch_idx)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch  # Lightning calls the constructors of batches with other arguments

    loader = DataLoader(data(torch.float32).dataset, batch_size=4, collate_fn=lambda rows: make(*collate(rows)))
    model = Taking()
    assert_shrunk(model, train(model, loader))


def collate(rows):
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def a_generator():
    yield from range(3)


def a_tensor_with_its_graph():
    return nn.Parameter(torch.ones(3)) * 2


class Holder:
    """An object with something inside that cannot be copied."""

    def __init__(self):
        self.lock, self.names = threading.Lock(), ["a"]


ATTRIBUTES = {
    "a lock": threading.Lock,
    "a generator": a_generator,
    "a socket": socket.socket,
    "a buffered reader": lambda: io.BufferedReader(io.FileIO("/dev/null")),
    "a thread's locals": threading.local,
    "a tensor with its graph": a_tensor_with_its_graph,
    "a distribution": lambda: torch.distributions.Normal(a_tensor_with_its_graph(), 1.0),
    "a lock in a list in a dictionary": lambda: {"locks": [threading.RLock()]},
    "an object that holds a lock": Holder,
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_that_cannot_be_copied(kind):
    """An attribute that cannot be copied hinders neither removal nor finalize, and stays what it is."""
    model = Lit()
    model.odd = ATTRIBUTES[kind]()
    odd = model.odd
    model.net.odd = odd
    assert_shrunk(model, train(model))
    assert model.odd is odd
    plain = finalize(model)
    assert plain.net[0].out_channels == 3
    if isinstance(odd, Holder):
        assert plain.odd.lock is odd.lock
        assert plain.odd is not odd
        assert plain.odd.names is not odd.names


class Deep(nn.Module):
    """Returns more in training than in evaluation."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Sequential(*small_net()[:6]), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.body(x)
        return {"out": self.head(hidden), "aux": self.auxiliary(hidden)} if self.training else self.head(hidden)


class DeepLit(Lit):
    def __init__(self):
        super().__init__()
        self.net = Deep()

    def loss(self, batch):
        return sum(nn.functional.cross_entropy(out, batch[1]) for out in self.net(batch[0]).values())


class Asserting(Lit):
    def training_step(self, batch, batch_idx):
        if not self.net[1].training:
            raise RuntimeError("this step is for training")
        return super().training_step(batch, batch_idx)


def test_steps_for_training_mode_alone():
    """A step that cannot run in evaluation mode proves removals in training mode."""
    model = Asserting()
    assert_shrunk(model, train(model))
    model = DeepLit()
    train(model, None, max_epochs=2)
    schedule = Kill({0: {"net.body.0": [1, 4], "net.body.4": [0, 7]}})
    torch.manual_seed(1)
    model = DeepLit()
    trainer = make_trainer(SelfCompression(gamma=0.01), schedule, max_epochs=2)
    trainer.fit(model, data(torch.float32))
    assert (model.net.body[0].out_channels, model.net.body[4].out_features) == (4, 14)
    assert (model.net.head.in_features, model.net.auxiliary.in_features) == (14, 14)


def test_many_pinned_channels_cost_no_pass_each():
    """Which channels are removable takes a few passes over all atoms, however many channels are pinned."""
    passes = []

    class Counted(np.ndarray):
        def max(self, *args, **kwargs):
            passes.append(self.size)
            return super().max(*args, **kwargs)

    for n in (1_000, 4_000):
        slots = (Slot("e.bit_depth", 0, n, 1, produces=True),)
        group = np.arange(n + 1).view(Counted)
        channels = Channels(slots, group, dict.fromkeys(range(1, n), "it is an output"))
        passes.clear()
        assert channels.removable().sum() == 1
        assert len(passes) <= 2


def test_sizes_are_exact_when_a_checkpoint_is_saved_and_not_else(tmp_path, monkeypatch):
    """With every_n_train_steps an exact report is made at these steps alone."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_selfcompress import callback
    from lightning_selfcompress.monitoring import monitor

    exact = []

    def counted(model, *, exact_=exact, **options):
        exact_.append(options.get("exact", True))
        return size_report(model, **options)

    for module in (callback, monitor):
        monkeypatch.setattr(module, "size_report", counted)
    saved = ModelCheckpoint(tmp_path, monitor="selfcompress/nbytes", every_n_train_steps=20, save_top_k=-1)
    train(Lit(), None, saved, max_epochs=1, enable_checkpointing=True)
    assert len(saved.best_k_models) == 3
    assert sum(exact) == 3 + 3  # and at the start of the training, the end of the epoch, and the end of the fit
