"""One run after another with the same network, callback or Trainer."""

import copy
import signal

import lightning.pytorch as pl
import pytest
import torch
import yaml
from compressing import Classifier, assert_shrunk, compress
from fits import SCHEDULE, Kill, assert_only_living, data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import Lit, batches, make_trainer, small_net, trained_tensors
from torch import nn

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.quantize.parameters import quantized_parameters


def learned(model):
    return [t.detach().clone() for p in quantized_parameters(model) for t in (p.raw_depth, p.exponent)]


def parameters(model):
    return {name: p.detach().clone() for name, p in trained_tensors(model).items()}


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.case("Trainer options", "fit called twice on the same Trainer")
def test_fit_twice_with_one_trainer():
    """The second fit goes on with the smaller network, its removals and its losses as in one fit of both."""
    torch.manual_seed(1)
    model = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer, channels=4, hidden=13)
    half = size_report(model).bits_per_weight
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data(torch.float32))
    assert len(model.losses) == 120
    assert_shrunk(model, trainer)
    assert size_report(model).bits_per_weight < half


@pytest.mark.case("Trainer options", "fit called again with a new Trainer, the callback {which}")
@pytest.mark.parametrize("which", ["the same", "a new one"])
def test_fit_again_with_a_new_trainer(which):
    """A network that was compressed goes on from its depths, and loses more channels."""
    torch.manual_seed(1)
    model, callback = Lit(), SelfCompression(gamma=0.01)
    trainer = make_trainer(callback, Kill({0: SCHEDULE[0]}), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer, channels=4, hidden=13)
    half = model.net[6].exponent.detach().clone()
    callback = callback if which == "the same" else SelfCompression(gamma=0.01)
    trainer = make_trainer(callback, Kill({0: {"net.0": [0], "net.4": [3]}}), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer)
    assert bool((model.net[6].exponent != half).all())


@pytest.mark.case("Trainer options", "the same callback with another network in another Trainer")
def test_one_callback_for_two_networks():
    """The second network is compressed as by a new callback, to the bit; the first one is left alone."""
    callback, ends = SelfCompression(gamma=0.01), []
    networks = [Lit() for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    for network, own in zip(networks, (callback, callback, SelfCompression(gamma=0.01)), strict=True):
        trainer = make_trainer(own, Kill(), max_epochs=2)
        trainer.fit(network, data(torch.float32))
        assert_shrunk(network, trainer)
        ends.append(network.losses)
    assert ends[0] == ends[1] == ends[2]
    assert same(list(trained_tensors(networks[0]).values()), list(trained_tensors(networks[1]).values()))


class Stopping(Classifier):
    """Breaks off once, in the second epoch."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        if self.error is not None and self.trainer.current_epoch == 1 and batch_idx == 7:
            error, self.error = self.error, None
            raise error
        return super().training_step(batch, batch_idx)


@pytest.mark.case("Trainer options", "fit after {what}")
@pytest.mark.parametrize("what", ["an exception", "KeyboardInterrupt"])
def test_fit_after_one_that_broke_off(what):
    """Module and optimizers are in order, and the next fit compresses on."""
    torch.manual_seed(1)
    model = Stopping(ArithmeticError("no luck") if what == "an exception" else KeyboardInterrupt())
    own = set(model.__dict__)
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), max_epochs=2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((ArithmeticError, SystemExit)):
        trainer.fit(model, data(torch.float32))
    signal.signal(signal.SIGINT, handler)  # Lightning ignores a second one
    assert set(model.__dict__) <= own | {"_hparams"}
    assert all("zero_grad" not in o.__dict__ for o in trainer.optimizers)
    assert model.net[0].out_channels == 4
    before, half = learned(model), size_report(model).bits_per_weight

    trainer = make_trainer(SelfCompression(gamma=0.01), Kill({0: {"net.4": [5]}}), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_only_living(trainer, model)
    assert model.net[0].out_channels == 3  # the channel that had died and not yet faded
    assert not same(before, learned(model))
    assert size_report(model).bits_per_weight < half


@pytest.mark.case("Trainer options", "{entry} before and after fit")
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_before_and_after(entry):
    """Before a fit it is the float network's function, within 8-bit rounding; after it that of the smaller one."""
    torch.manual_seed(1)
    model = Classifier()
    images = [images for images, _ in batches(2)]

    def outputs():
        trainer = make_trainer(SelfCompression(gamma=0.01))
        if entry == "predict":
            return torch.cat(trainer.predict(model, batches(2)))
        (metrics,) = getattr(trainer, entry)(model, batches(2), verbose=False)
        return torch.tensor(metrics["val_loss" if entry == "validate" else "test_loss"])

    def expected(network):
        with torch.no_grad():
            logits = torch.cat([network.eval()(x) for x in images])
        labels = torch.cat([labels for _, labels in batches(2)])
        return logits if entry == "predict" else nn.functional.cross_entropy(logits, labels)

    float_outputs = expected(copy.deepcopy(model.net))
    torch.testing.assert_close(outputs(), float_outputs, rtol=0, atol=0.02)
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), max_epochs=2)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer)
    before = parameters(model)
    torch.testing.assert_close(outputs(), expected(model.net), rtol=1e-5, atol=1e-5)
    assert same(list(before.values()), list(parameters(model).values()))


@pytest.mark.case("Trainer options", "a second fit without the callback: weights are trained, depths stay as learned")
def test_fit_without_the_callback():
    """No depth moves where no size presses on it, whatever the optimizer does; weights are trained on."""
    torch.manual_seed(1)
    model = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.5))
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill(), max_epochs=2)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer)
    depths, before, size = learned(model), parameters(model), size_report(model)
    make_trainer(max_epochs=1).fit(model, data(torch.float32))
    after = parameters(model)
    assert same(depths, learned(model))
    assert size_report(model).bits_per_weight == size.bits_per_weight
    for name, p in before.items():
        assert torch.equal(p, after[name]) is name.endswith(("bit_depth", "exponent"))
    (tested,) = make_trainer().test(model, batches(2), verbose=False)
    assert tested["test_loss"] < 10


@pytest.mark.case("Trainer options", "a third fit, with the callback again after one without")
def test_fit_with_the_callback_again():
    """Depths are trained again as soon as the callback is back."""
    torch.manual_seed(1)
    model = Lit(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.5))
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill({0: SCHEDULE[0]}), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer, channels=4, hidden=13)
    make_trainer().fit(model, batches())
    before = model.net[6].exponent.detach().clone()
    trainer = make_trainer(SelfCompression(gamma=0.01), Kill({0: {"net.0": [0], "net.4": [3]}}), max_epochs=1)
    trainer.fit(model, data(torch.float32))
    assert_shrunk(model, trainer)
    assert bool((model.net[6].exponent != before).all())


class Given(pl.LightningModule):
    """Gets its network as an argument, and saves all arguments."""

    def __init__(self, net, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.losses = net, []

    training_step, loss = Lit.training_step, Lit.loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


@pytest.mark.case("Trainer options", "save_hyperparameters() with a module among the arguments")
def test_module_as_hyperparameter(tmp_path):
    """The checkpoint needs pickle to open, as plain Lightning's does, and holds the smaller network."""
    plain = Given(small_net())
    trainer = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(plain, batches())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, trainer = compress(saved, make=lambda: Given(small_net()), max_epochs=3, enable_checkpointing=True)
    assert_shrunk(whole, trainer, hidden=10)
    for path in (tmp_path / "plain.ckpt", tmp_path / "epoch=2.ckpt"):
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            torch.load(path, weights_only=True)
        assert isinstance(torch.load(path, weights_only=False)["hyper_parameters"]["net"], nn.Sequential)
    net = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)["hyper_parameters"]["net"].eval()
    images = next(iter(batches()))[0]
    torch.testing.assert_close(net(images), whole.net.eval()(images), rtol=0, atol=0)


@pytest.mark.case("Loggers", "hyperparameter files of {kind}")
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_hyperparameter_files(kind, tmp_path):
    """The logger's hparams.yaml has the module's arguments and opens without any class of ours."""

    class Configured(Classifier):
        def __init__(self, width=16, *, name="digits"):
            super().__init__()
            self.save_hyperparameters()

    make = CSVLogger if kind == "CSVLogger" else TensorBoardLogger
    model, trainer = compress(make=Configured, logger=make(tmp_path, name="", version=""))
    assert_shrunk(model, trainer)
    hparams = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert hparams == {"width": 16, "name": "digits"}
