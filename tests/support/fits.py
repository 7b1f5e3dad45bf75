"""Fits in which channels are killed and removed, and what has to hold after each of them."""

import copy
from functools import partial

import lightning.pytorch as pl
import networks
import torch
from networks import Gan, Lit, batches

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.removal.fading import Fading

NEVER = 10**6  # epochs from one removal to the next, in a fit that watches and fades but removes nothing
SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}, 1: {"net.0": [0], "net.4": [3]}, 2: {"net.4": [8, 9]}}


class Kill(pl.Callback):
    """Brings depths to zero after the first step of some epochs: epoch -> layer -> channels, as first numbered."""

    def __init__(self, schedule=SCHEDULE):
        self.schedule = schedule

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch = trainer.current_epoch
        if batch_idx or epoch not in self.schedule:
            return
        removed = self.removed(trainer)
        for quantized in quantized_parameters(pl_module):
            layer = quantized.name.removesuffix(".weight")
            earlier = sorted(n for e, names in self.schedule.items() if e < epoch for n in names.get(layer, ()))
            for number in self.schedule[epoch].get(layer, ()):
                place = number - sum(n < number for n in earlier) if removed else number
                quantized.raw_depth.data.view(-1)[place] = -1.0
            quantized.layer.forget_quantized()

    def removed(self, trainer):
        compression = next(c for c in trainer.callbacks if isinstance(c, SelfCompression))
        return 0 < compression.prune_every_n_epochs < NEVER


class Hold(pl.Callback):
    """Fades the constants of dead channels where nothing is removed, on channels watched here."""

    def on_train_start(self, trainer, pl_module):
        net = copy.deepcopy(pl_module)
        watcher = Watcher(net)
        with watcher:
            watcher.pin_outputs(net.loss(next(iter(data(n=1)))), "it is the loss")
        self.fading = Fading(pl_module, watcher.channels())

    def on_train_batch_end(self, *_):
        self.fading.step()


class Widths(pl.Callback):
    """Writes down the widths after each epoch."""

    def __init__(self):
        self.seen = []

    def note(self, module):
        net = module.net
        self.seen.append((net[0].out_channels, net[1].num_features, net[4].in_features, net[6].in_features))

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self.note(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.note(pl_module)


make_trainer = partial(networks.make_trainer, max_epochs=4)


def data(dtype=torch.float64, n=60):
    """An epoch of more steps than a fade takes."""
    return batches(n, 4, dtype=dtype)


def fit(every, *callbacks, gamma=0.01, make=Lit, round_to=1, schedule=SCHEDULE, loader=None, **kwargs):
    """A training in float64: in float32 a code that is rounded the other way shows in the third digit of a loss."""
    torch.manual_seed(1)
    model = make()
    kwargs = {"precision": "64-true"} | kwargs
    dtype = torch.float64 if kwargs["precision"] == "64-true" else torch.float32
    compression = SelfCompression(gamma=gamma, prune_every_n_epochs=every, round_to=round_to)
    trainer = make_trainer(compression, *callbacks, Kill(schedule), **kwargs)
    trainer.fit(model, data(dtype, 60 * trainer.world_size) if loader is None else loader)
    return model, trainer


def largest_difference(some, others):
    assert len(some) == len(others) > 0
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def assert_only_living(trainer, model):
    """Optimizers hold the module's own parameters and depths, and state of these alone, in their shapes."""
    (compression,) = (c for c in trainer.callbacks if isinstance(c, SelfCompression))
    depth = {id(t) for p in quantized_parameters(model) for t in p.learned}
    own = {id(p) for p in model.parameters()} | depth
    adams = [d.adam for d in compression._depths._optimizers]
    held = []
    for optimizer in [*trainer.optimizers, *adams]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        held += map(id, params)
        assert {id(p) for p in optimizer.state} <= {id(p) for p in params}
        flat = (sum(p.numel() for p in params),) if isinstance(optimizer, torch.optim.LBFGS) else None
        for p, state in optimizer.state.items():
            tensors = [t for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
            assert all(t.shape == (flat or p.shape) for t in tensors)
    assert sorted(held) == sorted(own)
    assert depth.isdisjoint(id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"])


def assert_learning(trainer):
    """Depths or exponents of every weight have had a gradient."""
    (compression,) = (c for c in trainer.callbacks if isinstance(c, SelfCompression))
    for own in compression._depths._optimizers:
        for p in own.size.parameters:
            moments = [own.adam.state[t]["exp_avg_sq"] for t in p.learned if t in own.adam.state]
            assert any(bool(m.any()) for m in moments), p.name


class RecordingGan(Gan):
    def __init__(self):
        super().__init__()
        self.losses = []

    def manual_backward(self, loss, *args, **kwargs):
        self.losses.append(loss.item())
        super().manual_backward(loss, *args, **kwargs)


GAN = {0: {"generator.0": [2, 5], "discriminator.0": [11]}, 1: {"generator.0": [0], "discriminator.0": [0, 4]}}
