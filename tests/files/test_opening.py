"""What checkpoints of compressed networks are opened with, and what happens to those that do not fit."""

import pytest
import torch
from fits import SCHEDULE
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Lit, batches, make_trainer
from torch import nn
from trained import DATA, trained

from lightning_selfcompress import SelfCompression, load_from_checkpoint, size_report
from lightning_selfcompress.quantize.layers import Quantized


class WithHyperparameters(Lit):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4))


class Tied(Lit):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 4)
        self.other.weight = self.net[6].weight

    def loss(self, batch):
        hidden = self.net[:6](batch[0])
        return nn.functional.cross_entropy(self.net[6](hidden) - self.other(2 * hidden), batch[1])


class Built(Lit):
    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(4, 4)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.late(self.net(batch[0])), batch[1])


def outputs(model):
    images = next(iter(batches()))[0]
    with torch.no_grad():
        return model.net(images)


def assert_opens_to(model, opened):
    """The same class, shapes, printed layers, outputs to the bit, and bytes."""
    assert type(opened) is type(model)
    assert str(opened) == str(model)
    assert torch.equal(outputs(opened.eval()), outputs(model))
    assert size_report(opened).nbytes == size_report(model).nbytes
    assert size_report(opened).weights_left == size_report(model).weights_left


def with_hyperparameters():
    return WithHyperparameters(12)


KINDS = {
    "a full checkpoint": {},
    "save_weights_only=True": {"saving": {"weights_only": True}},
    "its own hyperparameters": {"make": with_hyperparameters},
    "arguments given": {"make": with_hyperparameters, "width": 12},
    "map_location": {"map_location": "cpu"},
    "weights_only=True": {"weights_only": True},
    "strict=False": {"strict": False},
    "layers built in configure_model": {"make": Built},
    "tied weights": {"make": Tied},
}


@pytest.mark.case("Loading without a Trainer", "lightning_selfcompress.load_from_checkpoint: {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint(kind, tmp_path):
    """The smaller network comes back, with its outputs to the bit, and can be trained on."""
    arguments = dict(KINDS[kind])
    make, saving = arguments.pop("make", Lit), arguments.pop("saving", {})
    schedule = {0: {"net.0": [1, 4], "net.1": [0, 3], "net.4": [0]}}
    model, trainer = trained(make, schedule=schedule)
    assert size_report(model).weights_left < 0.9
    trainer.save_checkpoint(tmp_path / "small.ckpt", **saving)
    opened = load_from_checkpoint(type(model), tmp_path / "small.ckpt", **arguments)
    assert opened.training
    assert_opens_to(model, opened)
    make_trainer(SelfCompression(gamma=0.05), max_epochs=1).fit(opened, batches(**DATA))
    assert len(opened.losses) == 60


@pytest.mark.case("Loading without a Trainer", "lightning_selfcompress.load_from_checkpoint: trained with skip=")
def test_load_what_was_skipped(tmp_path):
    """Layers that stayed float in the run are float in what is opened, without being told."""
    model, trainer = trained(schedule={0: {"net.0": [1]}}, compression=SelfCompression(gamma=0.05, skip=["net.6"]))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    opened = load_from_checkpoint(Lit, tmp_path / "small.ckpt")
    assert type(opened.net[6]) is nn.Linear
    assert_opens_to(model, opened)


@pytest.mark.case("Loading without a Trainer", "lightning_selfcompress.load_from_checkpoint: a float checkpoint")
def test_load_a_float_checkpoint(tmp_path):
    """A float network's checkpoint opens as it would without this package."""
    model = Lit()
    trainer = make_trainer()
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    opened = load_from_checkpoint(Lit, tmp_path / "float.ckpt")
    assert not any(isinstance(m, Quantized) for m in opened.modules())
    assert torch.equal(outputs(opened.eval()), outputs(model.eval()))


@pytest.mark.case(
    "Loading without a Trainer", "MyModule.load_from_checkpoint of a compressed checkpoint, strict={strict}"
)
@pytest.mark.parametrize("strict", [True, False])
def test_plain_load_from_checkpoint(strict, tmp_path, refusal):
    """Lightning's own function says which one opens the file."""
    _, trainer = trained()
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    with refusal(RuntimeError, "lightning_selfcompress.load_from_checkpoint" if strict else "size mismatch"):
        Lit.load_from_checkpoint(tmp_path / "small.ckpt", strict=strict)


@pytest.mark.case("Loading without a Trainer", "MyModule.load_from_checkpoint, nothing removed yet, strict=False")
def test_plain_load_of_full_shapes(tmp_path, refusal):
    """Where all shapes fit and keys may differ, Lightning's warning names the function that opens the file."""
    _, trainer = trained(schedule={})
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    with refusal.warning("lightning_selfcompress.load_from_checkpoint"):
        Lit.load_from_checkpoint(tmp_path / "full.ckpt", strict=False)


@pytest.mark.case("Loading without a Trainer", "load_state_dict of a checkpoint into a module that was trained")
def test_load_state_dict(tmp_path):
    """A trained module takes the state of an earlier checkpoint of its own, in that one's shapes."""
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, _ = trained(Lit, saved, epochs=3, enable_checkpointing=True)
    earlier = load_from_checkpoint(Lit, tmp_path / "epoch=0.ckpt").eval()
    model.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    assert_opens_to(earlier, model.eval())


EVALUATIONS = {"test": "test_loss", "validate": "val_loss"}


@pytest.mark.case("Checkpoints", "trainer.{what}(ckpt_path='best'), the best {where} than the network in memory")
@pytest.mark.parametrize("where", ["larger", "smaller"])
@pytest.mark.parametrize("what", ["test", "validate", "predict"])
def test_best(what, where, tmp_path):
    """The best checkpoint is evaluated in its own shapes, whatever has become of the network since."""
    schedule, mode = ({1: SCHEDULE[0]}, "min") if where == "larger" else ({0: SCHEDULE[0]}, "max")
    best = ModelCheckpoint(tmp_path, filename="best", monitor="epoch", mode=mode)
    model, trainer = trained(Predicting, best, schedule=schedule, enable_checkpointing=True)
    if where == "smaller":
        model = Predicting()  # of full size
    reference = load_from_checkpoint(Predicting, tmp_path / "best.ckpt").eval()
    before = model.net[0].out_channels
    result = getattr(trainer, what)(model, batches(), ckpt_path="best")
    assert model.net[0].out_channels == reference.net[0].out_channels
    assert before == 4 < model.net[0].out_channels if where == "larger" else before == 6 > model.net[0].out_channels
    if what == "predict":
        assert all(torch.equal(a, reference.net(b[0])) for a, b in zip(result, batches(), strict=True))
    else:
        losses = [reference.loss(batch).item() for batch in batches()]
        assert result[0][EVALUATIONS[what]] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


class Predicting(Lit):
    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def on_train_epoch_end(self):
        self.log("epoch", float(self.trainer.current_epoch))
