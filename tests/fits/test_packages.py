"""The same fit with the package lightning and with pytorch_lightning, whose classes are others."""

import importlib

import pytest
import torch
from compressing import assert_shrunk
from fits import Kill, data
from networks import Lit, batches, make_trainer, small_net

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.quantize.layers import Quantized

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def package(name):
    found = importlib.import_module(name)
    if name == "pytorch_lightning" and found.__version__ < "2.6":
        pytest.skip("Trainers of pytorch_lightning before 2.6 take no stateful callback of lightning")
    return found


def classes(name, setup=None):
    """A network and a Trainer of a package."""
    found = package(name)

    class Module(found.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses = small_net(), []

        loss, training_step, validation_step = Lit.loss, Lit.training_step, Lit.validation_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    if setup is not None:
        Module.setup = setup

    def trainer(*callbacks, **settings):
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return found.Trainer(accelerator="cpu", callbacks=list(callbacks), **(quiet | {"max_epochs": 2} | settings))

    return Module, trainer


@pytest.fixture(scope="module")
def alone():
    """Losses of the fit with the package that SelfCompression is made for."""
    torch.manual_seed(1)
    model = Lit()
    make_trainer(SelfCompression(gamma=0.01), Kill(), max_epochs=2).fit(model, data(torch.float32))
    return model.losses


@pytest.mark.case("Packages", "a Trainer and a module of {name}")
@pytest.mark.parametrize("name", PACKAGES)
def test_same_fit_in_both(name, alone):
    """The same channels leave and all losses are the same, to the bit."""
    make, trainer = classes(name)
    torch.manual_seed(1)
    model = make()
    trainer = trainer(SelfCompression(gamma=0.01), Kill())
    trainer.fit(model, data(torch.float32), batches(2))
    assert_shrunk(model, trainer)
    assert model.losses == alone
    assert trainer.callback_metrics["selfcompress/nbytes"] == size_report(model).nbytes


@pytest.mark.case("Packages", "layers that setup() of a module of {name} builds")
@pytest.mark.parametrize("name", PACKAGES)
def test_module_that_builds_itself(name):
    """Hooks of the module are found whichever package it is from."""

    def setup(self, stage):
        if len(self.net) == 7:
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(*small_net(), torch.nn.Identity())

    make, trainer = classes(name, setup)
    model, trainer = make(), trainer(SelfCompression(gamma=0.01), Kill())
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer)


@pytest.mark.case("Packages", "{name}: checkpoint of a shrunken network, resumed")
@pytest.mark.parametrize("name", PACKAGES)
def test_resuming_in_both(name, tmp_path):
    """A fit resumed in the package it was stopped in ends as one without interruption, to the bit."""
    make, trainer = classes(name)

    def go(**where):
        torch.manual_seed(1)
        saved = package(name).callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        model = make()
        trainer(SelfCompression(gamma=0.01), Kill(), saved, enable_checkpointing=True).fit(
            model, data(torch.float32), **where
        )
        return model

    whole = go()
    resumed = go(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == whole.losses[60:]
    assert resumed.net[0].out_channels == 3
    assert all(torch.equal(t, resumed.state_dict()[k]) for k, t in whole.state_dict().items())


@pytest.mark.case("Packages", "{name}: its own WeightAveraging and EarlyStopping")
@pytest.mark.parametrize("name", PACKAGES)
def test_callbacks_of_both(name):
    """An average of either package's callback shrinks along, and its EarlyStopping reads the sizes."""
    make, trainer = classes(name)
    callbacks = package(name).callbacks
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip(f"this version of {name} has no WeightAveraging")
    averaging = callbacks.WeightAveraging()
    stopping = callbacks.EarlyStopping("selfcompress/bits_per_weight", stopping_threshold=4.5)
    torch.manual_seed(1)
    model = make()
    trainer = trainer(averaging, SelfCompression(gamma=0.01), stopping, Kill(), max_epochs=20)
    trainer.fit(model, data(torch.float32))
    assert trainer.current_epoch < 20
    assert model.net[0].out_channels == averaging._average_model.module.net[0].out_channels < 6


@pytest.mark.case("Packages", "{name}: its own ModelPruning")
@pytest.mark.parametrize("name", PACKAGES)
def test_pruning_of_both_is_refused(name, refusal):
    """The refusal knows the callback by its name, whichever package it is from."""
    make, trainer = classes(name)
    model, pruning = make(), package(name).callbacks.ModelPruning("l1_unstructured", amount=0.5)
    with refusal(ValueError, "no ModelPruning beside SelfCompression"):
        trainer(pruning, SelfCompression(gamma=0.01)).fit(model, data(torch.float32))
    assert not any(isinstance(m, Quantized) for m in model.modules())
