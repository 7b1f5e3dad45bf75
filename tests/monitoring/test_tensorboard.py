"""Charts, pictures and hyperparameters in TensorBoard, and every scalar in every logger."""

import csv
import re
from argparse import Namespace

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import Lit, batches, make_trainer
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.monitoring.main_metric import MainMetric
from lightning_selfcompress.monitoring.tensorboard import chart_layout, log_channel_bits

TOTALS = {
    f"selfcompress/{name}"
    for name in ("bits_per_weight", "nbytes", "percent_of_float", "weights_left", "gamma", "size_loss", "loss")
}
LAYERS = {f"selfcompress_{kind}/net.{i}" for kind in ("bits", "channels") for i in (0, 4, 6)}
OWN = TOTALS | LAYERS | {"selfcompress_channels/total", "selfcompress_chart/share_of_float"}


class Saving(Lit):
    """A module that has its arguments logged by Lightning."""

    def __init__(self, width=3, colour="red"):
        super().__init__()
        self.save_hyperparameters()


class Declaring(Saving):
    """A module that logs its hyperparameters itself, with a metric, as Lightning's documentation has it."""

    def on_train_start(self):
        self.logger.log_hyperparams(self.hparams, {"hp/best": 0.5})


def read(logger):
    return EventAccumulator(logger.log_dir, {"tensors": 0, "scalars": 0, "images": 0}).Reload()


def run(folder, *callbacks, make=Lit, gamma=0.25, **kwargs):
    """A short fit with validation; the logger, what it wrote, and the module."""
    logger = TensorBoardLogger(folder, **kwargs)
    model = make()
    compression = SelfCompression(gamma) if gamma is not None else SelfCompression(target_size="50%")
    epochs = 2 if gamma is not None else 3
    trainer = make_trainer(compression, *callbacks, logger=logger, max_epochs=epochs, log_every_n_steps=4)
    trainer.fit(model, batches(4), batches(1))
    return logger, read(logger), trainer


def charts(events):
    (value,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(value.tensor_proto.string_val[0])
    return {c.title: list(c.multiline.tag) for category in layout.category for c in category.chart}


def compared(events):
    """The hyperparameters and the metrics by which TensorBoard compares a run."""
    content = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    start = hparams.parse_session_start_info_plugin_data(content[hparams.SESSION_START_INFO_TAG])
    experiment = hparams.parse_experiment_plugin_data(content[hparams.EXPERIMENT_TAG])
    values = {n: v.number_value or v.string_value for n, v in start.hparams.items()}
    return values, {m.name.tag for m in experiment.metric_infos}


def last(events, tag):
    return float(events.Tensors(tag)[-1].tensor_proto.float_val[0])


def test_a_run_in_tensorboard(tmp_path):
    """Few totals come first, layers have groups of their own, and an epoch has a picture; all by the stock logger."""
    logger, events, trainer = run(tmp_path)
    tags = set(events.PluginTagToContent("scalars"))
    assert {tag for tag in tags if tag.startswith("selfcompress")} == OWN
    shown = tags | set(events.PluginTagToContent("images")) | set(events.PluginTagToContent("histograms"))
    assert {tag for tag in shown if tag.startswith("selfcompress/")} == TOTALS
    assert len(events.Tensors("selfcompress_coded_bits/channels")) == 2  # pictures
    assert len(events.Tensors("selfcompress_depths/histogram")) == 2
    assert charts(events)["val_loss and size"] == ["val_loss$", "selfcompress_chart/share_of_float$"]
    assert compared(events) == (
        {"selfcompress/gamma": 0.25, "selfcompress/price": "bytes"},
        {"val_loss", "selfcompress/nbytes"},
    )
    report = size_report(trainer.lightning_module)
    assert last(events, "selfcompress/nbytes") == report.nbytes
    assert logger.hparams == {}


def test_the_chart_is_of_what_is_monitored(tmp_path):
    """The metric beside the size is one that EarlyStopping monitors, rather than the first of validation."""
    _, events, _ = run(tmp_path, EarlyStopping("loss"), gamma=None)
    assert next(iter(charts(events))) == "loss and size"
    assert charts(events)["bytes of the packed file"] == ["selfcompress/nbytes$", "selfcompress/target$"]


def test_which_metric_matters():
    """ModelCheckpoint comes before EarlyStopping, and validation is asked where neither monitors more than a size."""
    size = ModelCheckpoint(monitor="selfcompress/nbytes")
    known = {"loss": 3.0}
    trainer = Namespace(checkpoint_callbacks=[size], early_stopping_callbacks=[], callback_metrics=known)
    metric = MainMetric()
    assert metric.of(trainer) is None
    metric.begin_validation(trainer)
    known |= {"selfcompress/objective": 4.0, "acc": 0.5, "val_loss": 2.0}
    metric.end_validation(trainer)
    assert metric.of(trainer) == ("acc", 0.5)
    trainer.early_stopping_callbacks = [EarlyStopping("val_loss")]
    assert metric.of(trainer) == ("val_loss", 2.0)
    trainer.checkpoint_callbacks = [size, ModelCheckpoint(monitor="loss")]
    assert metric.of(trainer) == ("loss", 3.0)
    trainer.checkpoint_callbacks = [ModelCheckpoint(monitor="not_yet")]
    trainer.early_stopping_callbacks = []
    assert metric.of(trainer) is None


def test_charts_fit_their_tags():
    """A chart draws whole names and no longer ones, on the scale of the metric, with the logger's prefix."""
    layout = chart_layout(("acc (top-1)", 97.0), budget=True, prefix="run-")["selfcompress"]
    beside = layout["acc (top-1) and size"][1]
    assert [bool(re.match(tag, "run-acc (top-1)")) for tag in beside] == [True, False]
    assert [bool(re.match(tag, "run-selfcompress/percent_of_float")) for tag in beside] == [False, True]
    assert not any(re.match(tag, "run-acc (top-1)_extra") for tag in beside)
    assert layout["bytes of the packed file"][1][1] == r"run\-selfcompress/target$"
    assert (
        "selfcompress_chart/share_of_float$" in chart_layout(("a", 1.5), budget=False)["selfcompress"]["a and size"][1]
    )
    assert len(chart_layout(None, budget=False)["selfcompress"]) == 2


@pytest.mark.parametrize(
    ("make", "kwargs", "metrics", "extra"),
    [
        (Saving, {}, {"hp_metric", "selfcompress/nbytes"}, {"width": 3, "colour": "red"}),
        (Saving, {"default_hp_metric": False}, {"val_loss", "selfcompress/nbytes"}, {"width": 3, "colour": "red"}),
        (Declaring, {"default_hp_metric": False}, {"hp/best", "selfcompress/nbytes"}, {"width": 3, "colour": "red"}),
    ],
)
def test_hyperparameters_join_those_of_the_module(tmp_path, make, kwargs, metrics, extra):
    """What a module logs is compared as before, with gamma, price and bytes beside it; its file is as it was."""
    logger, events, trainer = run(tmp_path, make=make, **kwargs)
    own = {"selfcompress/gamma": 0.25, "selfcompress/price": "bytes"}
    assert compared(events) == (own | extra, metrics)
    with open(f"{logger.log_dir}/hparams.yaml") as file:
        assert yaml.safe_load(file) == extra
    assert logger.hparams == extra
    assert "log_hyperparams" not in vars(logger)
    if "hp_metric" in metrics:
        assert last(events, "hp_metric") == pytest.approx(float(trainer.callback_metrics["val_loss"]))


def test_what_is_logged_as_a_namespace(tmp_path):
    """Hyperparameters may be a namespace; gamma may be a function, of which the name is shown."""

    class WithNamespace(Lit):
        def on_train_start(self):
            self.logger.log_hyperparams(Namespace(depth=4), {"hp/best": 0.5})

    def ramp(step):
        return 0.1

    _, events, _ = run(tmp_path, make=WithNamespace, gamma=ramp)
    assert compared(events)[0] == {"depth": 4, "selfcompress/gamma": "ramp", "selfcompress/price": "bytes"}


def test_loggers_without_pictures_are_passed_over():
    """A logger whose experiment takes neither tensors nor pictures is left alone."""
    log_channel_bits([Namespace(experiment=object()), Namespace()], {"a.weight": torch.zeros(2)}, torch.zeros(2), 0)


def csv_names(folder):
    make_trainer(SelfCompression(0.1), logger=CSVLogger(folder, name="", version="")).fit(Lit(), batches(4), batches(1))
    with (folder / "metrics.csv").open() as file:
        return set(csv.DictReader(file).fieldnames)


def wandb_names(folder):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=folder, offline=True)
    make_trainer(SelfCompression(0.1), logger=logger).fit(Lit(), batches(4), batches(1))
    wandb.finish()
    written = next(folder.rglob("*.wandb")).read_bytes()
    return {name for name in OWN if name.encode() in written}


def mlflow_names(folder):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder))
    make_trainer(SelfCompression(0.1), logger=logger).fit(Lit(), batches(4), batches(1))
    return set(logger.experiment.get_run(logger.run_id).data.metrics)


@pytest.mark.parametrize(
    "names",
    [
        csv_names,
        pytest.param(wandb_names, marks=pytest.mark.nightly),
        pytest.param(mlflow_names, marks=pytest.mark.nightly),
    ],
)
def test_every_logger_gets_every_scalar(tmp_path, names):
    """CSV files, Weights & Biases and MLflow have each total and each layer."""
    assert {name for name in names(tmp_path) if name.startswith("selfcompress")} >= OWN - {"selfcompress/loss"}
