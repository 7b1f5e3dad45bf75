"""A dry run leaves everything outside the module as it was, or is refused with its reason."""

import logging
import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import Kill, data
from networks import Lit, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression

SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}
HISTORY: list = []
TABLE: dict = {"steps": 0}
COUNT = 0
SUMS = torch.zeros(3)
RING = np.zeros(4)


def fit(model, *callbacks, every=1, **settings):
    torch.manual_seed(1)
    compression = SelfCompression(gamma=0.0, bits_lr=0.0, prune_every_n_epochs=every)
    trainer = make_trainer(compression, *callbacks, Kill(SCHEDULE), **({"max_epochs": 3} | settings))
    trainer.fit(model, data(torch.float32))
    return trainer


def widths(net):
    return net[0].out_channels, net[4].out_features


class Counting(torch.optim.SGD):
    """Counts its steps."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


class ThroughTrainer(Lit):
    """Steps its optimizer, and schedules it, through the Trainer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizer = Counting(self.net.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]

    def training_step(self, batch, batch_idx):
        (optimizer,) = self.trainer.optimizers
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        for group in self.trainer.strategy.optimizers[0].param_groups:
            group["lr"] = 0.01 / (1 + self.trainer.global_step)
        optimizer.step()
        self.trainer.lr_scheduler_configs[0].scheduler.step()
        self.trainer.callback_metrics["seen"] = loss


def test_optimizer_reached_through_the_trainer():
    """The optimizer takes as many steps with removal as without, and its state and rate are those of its own steps."""
    found = []
    for every in (0, 1):
        model = ThroughTrainer()
        trainer = fit(model, every=every)
        found.append((trainer.optimizers[0].steps, trainer.lr_scheduler_configs[0].scheduler.last_epoch))
    assert found[0] == found[1] == (180, 180)
    assert widths(model.net) == (4, 13)


class Data(pl.LightningDataModule):
    """Counts what was asked of it."""

    def __init__(self):
        super().__init__()
        self.asked, self.log = 0, []

    def train_dataloader(self):
        return data(torch.float32)


class Writes(Lit):
    """Writes into lists, dictionaries, numbers, tensors and arrays outside, and into its datamodule and callbacks."""

    def training_step(self, batch, batch_idx):
        global COUNT
        COUNT += 1
        HISTORY.append(batch_idx)
        TABLE["steps"] += 1
        TABLE[f"of epoch {self.current_epoch}"] = batch_idx
        SUMS.add_(1)
        RING[batch_idx % 4] += 1
        Writes.made = getattr(Writes, "made", 0) + 1
        self.trainer.datamodule.asked += 1
        self.trainer.datamodule.log.append(batch_idx)
        self.trainer.callbacks[0].calls += 1
        self.trainer.global_rank_zero = random.random()
        return super().training_step(batch, batch_idx)


class Calls(pl.Callback):
    calls = 0


def test_objects_outside_are_as_before():
    """Whatever a step writes outside is written once for each step, however often it is repeated on copies."""
    global COUNT
    COUNT = 0
    HISTORY.clear()
    TABLE.clear()
    TABLE["steps"] = 0
    SUMS.zero_()
    RING.fill(0)
    Writes.made = 0
    torch.manual_seed(1)
    model, module_data, calls = Writes(), Data(), Calls()
    compression = SelfCompression(gamma=0.0, bits_lr=0.0)
    trainer = make_trainer(calls, compression, Kill(SCHEDULE), max_epochs=3)
    trainer.fit(model, datamodule=module_data)
    assert widths(model.net) == (4, 13)
    assert COUNT == len(HISTORY) == TABLE["steps"] == Writes.made == calls.calls == 180
    assert HISTORY == module_data.log == [*range(60)] * 3
    assert TABLE["of epoch 2"] == 59
    assert len(TABLE) == 4
    assert SUMS.tolist() == [180] * 3
    assert RING.tolist() == [45] * 4
    assert module_data.asked == 180


def test_random_states_and_gradients_are_as_before():
    """The generators of Python, NumPy and torch go on as without removal, and gradients are those of the last step."""
    found = []
    for every in (0, 1):
        random.seed(3)
        np.random.seed(3)

        class Draws(Lit):
            drawn: tuple = ()

            def loss(self, batch):
                self.drawn = (*self.drawn, random.random(), np.random.rand(), float(torch.rand(())))
                return super().loss(batch)

        model = Draws()
        fit(model, every=every)
        found.append(model.drawn)
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["an attribute", "a global", "opened in the step"])
def test_files(how, tmp_path, caplog, capsys):
    """A file that is open gets a line for each step; a step that opens one to write is refused, which is told once."""
    path = tmp_path / "log.txt"
    file = path.open("w")

    class Logs(Lit):
        def __init__(self):
            super().__init__()
            self.file = file if how == "an attribute" else None

        def training_step(self, batch, batch_idx):
            if how == "opened in the step":
                with Path(path).open("a") as opened:
                    opened.write("step\n")
            else:
                (self.file or file).write("step\n")
            print("a step")
            logging.getLogger("own").warning("a step")
            return super().training_step(batch, batch_idx)

    model = Logs()
    with caplog.at_level("INFO"):
        fit(model)
    file.close()
    assert path.read_text() == "step\n" * 180
    assert capsys.readouterr().out.count("a step") == 180
    assert sum(r.name == "own" for r in caplog.records) == 180
    refused = [r.getMessage() for r in caplog.records if "the step opens" in r.getMessage()]
    if how == "opened in the step":
        assert widths(model.net) == (6, 16)
        assert len(refused) == 2  # one for each layer
        assert all("log.txt" in line for line in refused)
    else:
        assert widths(model.net) == (4, 13)
        assert not refused


def test_iterator_of_the_module(caplog):
    """A step that takes from an iterator that cannot be copied is refused, and nothing is taken in vain."""

    def numbers():
        yield from range(10**6)

    class Takes(Lit):
        def __init__(self):
            super().__init__()
            self.numbers = numbers()

        def training_step(self, batch, batch_idx):
            self.last = next(self.numbers)
            return super().training_step(batch, batch_idx)

    model = Takes()
    with caplog.at_level("INFO", "lightning_selfcompress"):
        fit(model)
    assert model.last == 179
    assert widths(model.net) == (6, 16)
    assert any("takes from 'numbers'" in r.getMessage() for r in caplog.records)


def test_loggers_get_nothing_of_a_dry_run(tmp_path):
    """What a step logs, through the module or the experiment, is logged once for each step."""
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    calls = []

    class Logs(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.logger.log_metrics({"own": 1.0}, step=self.global_step)
            self.trainer.logger.experiment.log_metrics({"direct": 1.0}, step=self.global_step)
            return loss

    logger.log_metrics = lambda metrics, step=None: calls.append(metrics)
    model = Logs()
    fit(model, logger=logger, log_every_n_steps=1)
    assert sum("own" in metrics for metrics in calls) == 180
    assert widths(model.net) == (4, 13)


class Missing:
    """Stands for a package that is not installed, and raises whatever is asked of it."""

    def __getattr__(self, name):
        raise ModuleNotFoundError(f"No module named 'optional', which has {name}")


OPTIONAL = Missing()


class WithOptionalPackage(Lit):
    """Names a package that is not installed, for a case that does not occur."""

    def training_step(self, batch, batch_idx):
        if batch is None:
            return OPTIONAL.loss(self)
        return super().training_step(batch, batch_idx)


def test_placeholder_of_a_missing_package():
    """What raises errors of its own when it is looked at does not stop a removal."""
    model = WithOptionalPackage()
    fit(model)
    assert widths(model.net) == (4, 13)
