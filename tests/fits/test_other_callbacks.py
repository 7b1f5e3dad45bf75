"""Lightning's other callbacks beside SelfCompression, in fits where channels leave."""

import lightning.pytorch as pl
import pytest
import torch
from compressing import Classifier, Record, assert_shrunk, compress, survivors
from fits import SCHEDULE, Kill, assert_learning, assert_only_living, data
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize
from networks import Lit, batches, make_trainer

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters


@pytest.fixture(scope="module")
def alone():
    """Losses of the fit with no other callback than SelfCompression."""
    return compress()[0].losses


def neutral_callbacks(folder):
    """Callbacks that watch: with them the fit is the same to the bit."""
    return {
        "LearningRateMonitor": lambda: LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
        "Timer": lambda: Timer(duration="00:01:00:00"),
        "DeviceStatsMonitor": lambda: DeviceStatsMonitor(cpu_stats=True),
        "LambdaCallback": lambda: LambdaCallback(on_train_epoch_end=lambda *_: None),
        "ModelSummary": lambda: ModelSummary(max_depth=-1),
        "RichModelSummary": lambda: RichModelSummary(max_depth=-1),
        "TQDMProgressBar": lambda: TQDMProgressBar(refresh_rate=20),
        "RichProgressBar": lambda: RichProgressBar(refresh_rate=20),
        "ThroughputMonitor": lambda: ThroughputMonitor(lambda batch: len(batch[0]), window_size=4),
        "OnExceptionCheckpoint": lambda: lightning_callbacks.OnExceptionCheckpoint(folder),
        "SpikeDetection": lambda: lightning_callbacks.SpikeDetection(warmup=1000),
        "EarlyStopping without reason": lambda: EarlyStopping("loss", patience=100),
    }


@pytest.mark.case("Other callbacks", "{name} beside SelfCompression changes nothing")
@pytest.mark.parametrize("name", neutral_callbacks(None))
def test_callbacks_that_watch(name, tmp_path, alone):
    """The callback does its work, channels leave, and all losses are those of the fit without it, to the bit."""
    if name in ("SpikeDetection", "OnExceptionCheckpoint") and not hasattr(lightning_callbacks, name):
        pytest.skip(f"this version of lightning has no {name}")
    callback = neutral_callbacks(tmp_path)[name]()
    logger = CSVLogger(tmp_path, name="", version="")
    bar = isinstance(callback, (TQDMProgressBar, RichProgressBar))
    settings = {"log_every_n_steps": 10, "enable_progress_bar": bar}
    model, trainer = compress(callback, logger=logger, enable_checkpointing=name == "OnExceptionCheckpoint", **settings)
    assert_shrunk(model, trainer)
    assert model.losses == alone
    seen = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    wanted = {"LearningRateMonitor": "lr-Adam", "DeviceStatsMonitor": "cpu_percent", "ThroughputMonitor": "samples_per"}
    assert wanted.get(name, "selfcompress/nbytes") in seen
    if name == "Timer":
        assert callback.time_elapsed("train") > 0


@pytest.mark.case("Other callbacks", "ModelSummary counts the parameters that are there")
def test_summary_counts_what_is_there():
    """A summary counts depths and exponents while they are trained, and only the channels that are left after."""

    class Summarized(Lit):
        example_input_array = torch.zeros(2, 1, 8, 8)

        def forward(self, images):
            return self.net(images)

    counts = []

    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            counts.append(summarize(pl_module, max_depth=-1).trainable_parameters)

    model, _ = compress(Count(), make=Summarized)
    assert counts == [sum(p.numel() for p in Lit().parameters())]
    summary = summarize(model, max_depth=-1)
    assert summary.total_parameters == sum(p.numel() for p in model.parameters())
    conv = summary.layer_names.index("net.0")
    assert summary.param_nums[conv] == 3 * 9 + 3
    assert summary.out_sizes[conv] == [2, 3, 6, 6]


@pytest.mark.case("Other callbacks", "EarlyStopping on {monitor}")
@pytest.mark.parametrize(
    ("monitor", "mode", "threshold"),
    [
        ("val_accuracy", "max", 0.5),
        ("selfcompress/bits_per_weight", "min", 3.0),
        ("selfcompress/nbytes", "min", 1000.0),
    ],
)
def test_early_stopping(monitor, mode, threshold):
    """Training ends with the first epoch at whose end the accuracy, or the size, is past the threshold."""
    values = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                values.append(float(trainer.callback_metrics[monitor]))

        def on_train_end(self, trainer, pl_module):
            values.append(float(trainer.callback_metrics[monitor]))

    stopping = EarlyStopping(monitor, mode=mode, stopping_threshold=threshold)
    model, trainer = compress(Note(), stopping, make=Classifier, val=data(torch.float32), max_epochs=20)
    assert model.net[0].out_channels == 3
    assert 2 <= len(values) == trainer.current_epoch < 20
    assert [(v > threshold) is (mode == "max") for v in values] == [False] * (len(values) - 1) + [True]
    report = size_report(model)
    actual = {"selfcompress/bits_per_weight": report.bits_per_weight, "selfcompress/nbytes": report.nbytes}
    assert values[-1] == pytest.approx(actual.get(monitor, values[-1]))


class Backbone(Lit):
    """A frozen backbone and a head: the optimizer holds the head alone at first."""

    def __init__(self):
        super().__init__(lambda m: torch.optim.Adam(m.net[3:].parameters(), lr=1e-3, weight_decay=0.5))
        self.backbone = self.net[:3]


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
        elif epoch > 1:  # Lightning leaves the backbone frozen when it resumes
            self.make_trainable(pl_module.backbone)


FINETUNING = {"BackboneFinetuning": lambda: BackboneFinetuning(1, verbose=False), "BaseFinetuning": Unfreeze}


@pytest.mark.case("Other callbacks", "{name}, listed {place} SelfCompression")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning(name, place, tmp_path):
    """A frozen backbone keeps weights and depths; once unfrozen both are trained, also in a resumed fit."""
    record = Record("on_train_epoch_start")

    def go(**settings):
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        own, none = [FINETUNING[name]()], []
        before, after = (own, none) if place == "before" else (none, own)
        settings |= {"make": Backbone, "max_epochs": 4, "enable_checkpointing": True}
        return compress(*after, record, saved, first=before, **settings)

    whole, trainer = go()
    assert whole.net[4].out_features <= 10  # weight decay and the price may empty more channels than are killed
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [4, 4]
    assert_only_living(trainer, whole)
    start, unfrozen = survivors(record.states[0][1], 0, 1), record.states[1][1]
    for key in ("net.0.weight", "net.0.bit_depth", "net.0.exponent"):
        torch.testing.assert_close(unfrozen[key], start[key], rtol=0, atol=0)
    assert_learning(trainer)

    resumed, trainer = go(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [4, 4]
    for key, tensor in whole.state_dict().items() if name == "BaseFinetuning" else ():
        torch.testing.assert_close(resumed.state_dict()[key], tensor, rtol=0, atol=0)


class Tunable(Lit):
    """Has a learning rate and a batch size of its own, for the tuner to find."""

    def __init__(self):
        super().__init__(lambda m: torch.optim.Adam(m.parameters(), lr=m.lr))
        self.lr, self.batch_size = 1e-3, 4

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data(torch.float32).dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return batches(2)


@pytest.mark.case("Other callbacks", "{name}{when}")
@pytest.mark.parametrize(
    ("name", "when"),
    [
        *((name, when) for name in ("LearningRateFinder", "BatchSizeFinder") for when in ("", " in a second fit")),
        ("Tuner.lr_find", ""),
        ("Tuner.scale_batch_size", ""),
    ],
)
def test_finders(name, when, tmp_path):
    """The search leaves the network as it was, and the fit after it compresses with what was found."""
    torch.manual_seed(1)
    model, learned = Tunable(), []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            learned.append([p.raw_depth.clone() for p in quantized_parameters(pl_module)])

    def trainer(*callbacks, schedule):
        return make_trainer(
            *callbacks, SelfCompression(gamma=0.01), Look(), Kill(schedule), max_epochs=4, default_root_dir=tmp_path
        )

    schedule = {0: SCHEDULE[0]}
    if when:
        trainer(schedule=schedule).fit(model)
        schedule = {}
        learned.clear()
    kept = [p.raw_depth.detach().clone() for p in quantized_parameters(model)]
    if name == "LearningRateFinder":
        fitting = trainer(LearningRateFinder(num_training_steps=20), schedule=schedule)
    elif name == "BatchSizeFinder":
        fitting = trainer(BatchSizeFinder(max_trials=3, steps_per_trial=2), schedule=schedule)
    else:
        fitting = trainer(schedule=schedule)
        tuner = Tuner(fitting)
        if name == "Tuner.lr_find":
            tuner.lr_find(model, num_training=20)
        else:
            tuner.scale_batch_size(model, max_trials=3, steps_per_trial=2)
    fitting.fit(model)
    assert model.lr != 1e-3 if name in ("LearningRateFinder", "Tuner.lr_find") else model.batch_size > 4
    (learned,) = learned
    if when:
        assert all(torch.equal(a, b) for a, b in zip(learned, kept, strict=True))
    else:
        assert all(bool((depth == 8).all()) for depth in learned)
    assert_shrunk(model, fitting, channels=4, hidden=model.net[4].out_features)
    assert model.net[4].out_features <= 13


@pytest.mark.case("Other callbacks", "GradientAccumulationScheduler")
def test_accumulation_that_changes():
    """Where the number of accumulated batches changes with the epochs, depths step with the weights."""
    steps = []

    class Steps(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            (compression,) = (c for c in trainer.callbacks if isinstance(c, SelfCompression))
            states = [s for d in compression._depths._optimizers for s in d.adam.state.values()]
            steps.append({int(s["step"]) for s in states})

    model, trainer = compress(GradientAccumulationScheduler({0: 1, 1: 3}), Steps())
    assert_shrunk(model, trainer)
    assert steps == [{60}, {80}]


@pytest.mark.case("Other callbacks", "BasePredictionWriter")
def test_prediction_writer():
    """A writer gets the predictions of the smaller network."""

    class Writer(BasePredictionWriter):
        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            self.predictions = torch.cat(predictions)

    writer = Writer("epoch")
    model, trainer = compress(writer, make=Classifier)
    assert_shrunk(model, trainer)
    trainer.predict(model, data(torch.float32))
    with torch.no_grad():
        expected = torch.cat([model.net.eval()(images) for images, _ in data(torch.float32)])
    torch.testing.assert_close(writer.predictions, expected)


@pytest.mark.case("Other callbacks", "ModelPruning, listed {place} SelfCompression")
@pytest.mark.parametrize("place", ["before", "after"])
def test_pruning_is_refused(place, refusal):
    """Masks and learned depths on the same weights are refused before training; the module stays as it was."""
    model = Lit()
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    own = SelfCompression(gamma=0.01)
    trainer = make_trainer(*((pruning, own) if place == "before" else (own, pruning)))
    with refusal(ValueError, "no ModelPruning beside SelfCompression: .* or train with it first"):
        trainer.fit(model, batches())
    assert model.losses == []
    assert not any(isinstance(m, Quantized) for m in model.modules())


@pytest.mark.case("Other callbacks", "SelfCompression after a fit with ModelPruning(make_pruning_permanent=True)")
def test_pruned_network_is_compressed():
    """What was pruned before is where compression starts: the remedy that the refusal names."""
    model = Lit()
    make_trainer(ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=True)).fit(model, batches())
    zeros = int((model.net[4].weight == 0).sum())
    assert zeros > 1000
    trained, trainer = compress(make=lambda: model)
    assert_shrunk(trained, trainer)


class Louder(SelfCompression):
    """A subclass, which Lightning takes for another callback."""


@pytest.mark.case("Other callbacks", "two SelfCompression callbacks")
def test_two_of_the_same(refusal):
    """Lightning refuses two callbacks of one class and state already when the Trainer is made."""
    with refusal(RuntimeError, "more than one stateful callback of type `SelfCompression`"):
        make_trainer(SelfCompression(gamma=0.01), SelfCompression(gamma=0.1))


@pytest.mark.case("Other callbacks", "SelfCompression and a subclass of it")
def test_two_that_lightning_tells_apart(refusal):
    """Two callbacks that compress the same network are refused before training; the module stays as it was."""
    model = Lit()
    with refusal(ValueError, "one SelfCompression callback in the Trainer, got SelfCompression and Louder"):
        make_trainer(SelfCompression(gamma=0.01), Louder(gamma=0.1)).fit(model, batches())
    assert not any(isinstance(m, Quantized) for m in model.modules())
