"""The objective on the validation split: what training minimizes, as one line for a user."""

import csv

import pytest
import torch
from fits import SCHEDULE, Kill
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks import Lit, batches, make_trainer

from lightning_selfcompress import Objective, SelfCompression, load_from_checkpoint, size_report
from lightning_selfcompress.size.model_bytes import ModelBytes


class Late(Lit):
    """Logs its loss at the very end of a validation."""

    def validation_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), self.loss(batch)]

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.seen).mean())
        self.seen = []


def run(*callbacks, model=None, gamma=0.5, price="bytes", **settings):
    torch.manual_seed(1)
    model = Lit() if model is None else model
    compression = [SelfCompression(gamma=gamma, price=price)] if gamma is not None else []
    trainer = make_trainer(*compression, *callbacks, Kill(SCHEDULE), max_epochs=3, **settings)
    if gamma is None:
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Kill)]
    trainer.fit(model, batches(60, 4), batches(4))
    return model, trainer


def price_of(price, model):
    """The bits per weight that training minimizes."""
    return size_report(model).bits_per_weight if price == "bits" else float(ModelBytes.of(model).bits_per_weight())


@pytest.mark.parametrize("price", ["bytes", "bits"])
@pytest.mark.parametrize("make", [Lit, Late])
def test_is_the_loss_plus_gamma_times_the_price(make, price, tmp_path):
    """At every validation's end it is the validation loss plus gamma times the price that is minimized."""
    logger = CSVLogger(tmp_path, name="", version="")
    model, trainer = run(Objective("val_loss"), model=make(), price=price, logger=logger)
    known = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert known["selfcompress/objective"] == pytest.approx(known["val_loss"] + 0.5 * price_of(price, model), rel=1e-6)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("selfcompress/objective")]
    assert len(rows) == 3
    assert float(rows[-1]["selfcompress/objective"]) == pytest.approx(known["selfcompress/objective"], rel=1e-6)


@pytest.mark.parametrize("price", ["bytes", "bits"])
def test_chooses_the_best_checkpoint(price, tmp_path):
    """ModelCheckpoint keeps the epoch with the least objective, and the file's own objective is the recorded one."""
    saved = ModelCheckpoint(tmp_path, monitor="selfcompress/objective", save_top_k=-1, filename="{epoch}")
    run(Objective("val_loss"), saved, price=price, enable_checkpointing=True)
    assert len(saved.best_k_models) == 3
    for path, recorded in saved.best_k_models.items():
        model = load_from_checkpoint(Lit, path).eval()
        with torch.no_grad():
            losses = [model.loss(batch) for batch in batches(4)]
        expected = torch.stack(losses).mean().item() + 0.5 * price_of(price, model)
        assert recorded.item() == pytest.approx(expected, rel=1e-5)
    assert saved.best_model_score == min(saved.best_k_models.values())


def test_stops_early_by_it():
    """EarlyStopping that is listed before it finds it all the same."""
    stopping = EarlyStopping("selfcompress/objective", stopping_threshold=1e9)
    _, trainer = run(stopping, Objective("val_loss"))
    assert trainer.current_epoch == 1


def test_of_a_float_network_is_its_loss():
    """Without compression the objective is the loss, so that a float network is chosen by the same line."""
    _, trainer = run(Objective("val_loss"), gamma=None)
    assert trainer.callback_metrics["selfcompress/objective"] == pytest.approx(
        trainer.callback_metrics["val_loss"].item()
    )


def test_a_loss_that_is_not_logged_is_named():
    """A name that the module does not log is an error that says which names there are."""
    with pytest.raises(ValueError, match="Expected a loss 'valid' that the module logs in validation, found 'loss'"):
        run(Objective("valid"))


def test_sanity_check_needs_no_loss():
    """The sanity check, which knows no Q yet, neither logs nor raises."""
    model, trainer = run(Objective("val_loss"), num_sanity_val_steps=2)
    assert "selfcompress/objective" in trainer.callback_metrics
    assert model.net[0].out_channels == 3
