"""Lightning's other callbacks beside SelfCompression, in fits where channels leave."""

from types import MappingProxyType

import lightning.pytorch as pl
import pytest
import torch
from fits import Classifier, assert_shrunk, compress
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
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize
from networks import Lit, batches, make_trainer
from test_removal_fit import SCHEDULE, Kill, assert_only_living, data

from lightning_selfcompress import SelfCompression, convert, size_report, take_shapes
from lightning_selfcompress.layers import Quantized, quantized_parameters

# which entries of a tensor belong to which channels, by the numbers they had at first
AXES = {
    "net.0": {0: "channels"},
    "net.1": {0: "channels"},
    "net.4.weight": {0: "hidden", 1: "flat"},
    "net.4": {0: "hidden"},
    "net.6.weight": {1: "hidden"},
}


def alive(epochs, axis):
    """Numbers of what is left after the removals of some epochs."""
    if axis == "flat":
        return [36 * n + i for n in alive(epochs, "channels") for i in range(36)]
    layer, count = ("net.0", 6) if axis == "channels" else ("net.4", 16)
    gone = {n for e in range(epochs) for n in SCHEDULE.get(e, {}).get(layer, ())}
    return [n for n in range(count) if n not in gone]


def survivors(state, epochs, removals):
    """A state after some epochs without what goes until all ``removals`` are done."""
    result = {}
    for name, tensor in state.items():
        layer = name.rpartition(".")[0]
        for dim, axis in AXES.get(name, AXES.get(layer, {})).items() if tensor.dim() else ():
            now, then = alive(epochs, axis), alive(removals, axis)
            tensor = tensor.index_select(dim, torch.tensor([now.index(n) for n in then]))
        result[name] = tensor
    return result


class Record(pl.Callback):
    """States of the module, with the number of removals before them."""

    def __init__(self, hook):
        self.states = []
        setattr(self, hook, self.record)

    def record(self, trainer, pl_module, *_):
        state = {name: t.detach().clone() for name, t in pl_module.state_dict().items()}
        self.states.append((trainer.current_epoch, state))


def by_hand(states, removals, rule):
    """An average over states, of the entries that are left in the end."""
    average = None
    for n, (epoch, state) in enumerate(states):
        state = survivors(state, epoch, removals)
        average = state if average is None else {k: rule(v.float(), state[k].float(), n) for k, v in average.items()}
    return average


def equal_weights(average, value, n):
    return average + (value - average) / (n + 1)


def network_of(state):
    """A fresh network with this state."""
    model = Lit()
    convert(model)
    take_shapes(model, state)
    model.load_state_dict(state)
    return model.net.eval()


def assert_is_average(model, expected, *, buffers=True):
    state = model.state_dict()
    names = dict(model.named_parameters()).keys() if not buffers else {n for n, t in state.items() if t.dim()}
    for name in names:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-5)
    images = next(iter(batches()))[0]
    expected = network_of(expected if buffers else {n: expected[n] if n in names else t for n, t in state.items()})
    torch.testing.assert_close(model.net.eval()(images), expected(images), rtol=1e-2, atol=1e-2)


AVERAGES = {
    "WeightAveraging": ({}, equal_weights),
    "EMAWeightAveraging": ({"decay": 0.9}, lambda average, value, n: 0.9 * average + 0.1 * value),
}


@pytest.mark.case("Other callbacks", "{name}, listed {place} SelfCompression: the average loses the same channels")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_every_step(name, place):
    """The network a fit ends with is the average over its steps, of the channels that are left, as done by hand."""
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this version of lightning has no {name}")
    arguments, rule = AVERAGES[name]
    averaging = getattr(lightning_callbacks, name)(**arguments)
    record = Record("on_train_batch_end")
    both = (averaging, record)
    model, trainer = compress(*both) if place == "after" else compress(first=both)
    assert_shrunk(model, trainer)
    assert len(record.states) == 120
    assert_is_average(model, by_hand(record.states, 2, rule))


@pytest.mark.case("Other callbacks", "StochasticWeightAveraging, listed {place} SelfCompression")
@pytest.mark.parametrize("place", ["before", "after"])
def test_averages_of_every_epoch(place):
    """What SWA leaves is the average over the starts of its epochs, of the channels that are left, as done by hand."""
    both = StochasticWeightAveraging(1e-3, swa_epoch_start=3), Record("on_train_epoch_start")
    callbacks = {"max_epochs": 5} | ({"first": both} if place == "before" else {})
    model, trainer = compress(*(both if place == "after" else ()), **callbacks)
    assert_shrunk(model, trainer, hidden=10)
    states = both[1].states
    assert [epoch for epoch, _ in states] == [0, 1, 2, 3, 4, 5]  # the last one is for batch normalization
    expected, (_, last) = by_hand(states[2:5], 5, equal_weights), states[5]
    for name, p in model.named_parameters():
        torch.testing.assert_close(last[name], expected[name], rtol=1e-5, atol=1e-6)
        # with or without compression Adam takes one more step, on its momentum, in the last epoch
        assert float((p.detach() - last[name]).abs().max()) < 3e-3 * (not name.endswith(("depth", "exponent"))) + 1e-9


@pytest.mark.case("Other callbacks", "WeightAveraging validates with the average's own quantized weights")
@pytest.mark.parametrize("accumulate", [3])
def test_no_stale_weights_around_averages(accumulate):
    """In validation and after the fit the network computes with the average, not with weights kept from before."""
    if not hasattr(lightning_callbacks, "WeightAveraging"):
        pytest.skip("this version of lightning has no WeightAveraging")
    differences = []

    def compare(pl_module):
        images = next(iter(batches()))[0]
        with torch.no_grad():
            anew = network_of(pl_module.state_dict())(images)
            differences.append(float((pl_module.net(images) - anew).abs().max()))

    class Compare(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            compare(pl_module)

    settings = {"accumulate_grad_batches": accumulate, "val": batches(1), "val_check_interval": 20}
    model, trainer = compress(Compare(), first=[lightning_callbacks.WeightAveraging()], **settings)
    model.net.training = False  # by hand, without the walk over all layers that model.eval() is
    for layer in model.net:
        layer.training = False
    compare(model)
    assert_shrunk(model, trainer)
    assert len(differences) == 1 + 1 + 6
    assert max(differences) < 1e-6


@pytest.mark.case("Other callbacks", "{name}, listed {place} SelfCompression, resumed from a shrunken checkpoint")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", ["WeightAveraging", "StochasticWeightAveraging"])
def test_resumed_averages(tmp_path, name, place):
    """A fit that goes on from a checkpoint with an average ends where one without interruption ends."""
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this version of lightning has no {name}")

    def go(**settings):
        arguments = {} if name == "WeightAveraging" else {"swa_lrs": 1e-3, "swa_epoch_start": 2}
        own = [getattr(lightning_callbacks, name)(**arguments)]
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        before, after = (own, []) if place == "before" else ([], own)
        return compress(*after, saved, first=before, enable_checkpointing=True, max_epochs=4, **settings)

    whole, _ = go()
    resumed, trainer = go(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_shrunk(resumed, trainer, hidden=10)
    assert len(resumed.losses) == len(whole.losses) - 120
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)


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
    model, trainer = compress(
        callback, logger=logger, enable_checkpointing=name == "OnExceptionCheckpoint", **settings
    )
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
    learned = 2 * (6 + 16 + 4)
    assert counts == [sum(p.numel() for p in Lit().parameters()) + learned]
    summary = summarize(model, max_depth=-1)
    assert summary.total_parameters == sum(p.numel() for p in model.parameters())
    conv = summary.layer_names.index("net.0")
    assert summary.param_nums[conv] == 3 * 9 + 3 + 2 * 3
    assert summary.out_sizes[conv] == [2, 3, 6, 6]


@pytest.mark.case("Other callbacks", "EarlyStopping on {monitor}")
@pytest.mark.parametrize(
    ("monitor", "mode", "threshold"),
    [
        ("val_accuracy", "max", 0.5),
        ("selfcompress/bits_per_weight", "min", 3.0),
        ("selfcompress/nbytes", "min", 2000.0),
    ],
)
def test_early_stopping(monitor, mode, threshold):
    """Training ends with the first epoch at whose end the accuracy, or the size, is past the threshold."""
    values = []

    class Note(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
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
    assert whole.net[4].out_features == 10
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [4, 4]
    assert_only_living(trainer, whole)
    start, unfrozen = survivors(record.states[0][1], 0, 1), record.states[1][1]
    for key in ("net.0.weight", "net.0.bit_depth", "net.0.exponent"):
        torch.testing.assert_close(unfrozen[key], start[key], rtol=0, atol=0)
    assert bool((whole.net[0].bit_depth != 8).any())

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


@pytest.mark.case("Other callbacks", "{how} {what}")
@pytest.mark.parametrize("what", ["learning rate", "batch size"])
@pytest.mark.parametrize("how", ["callback that finds the", "Tuner that finds the", "callback, second fit, that finds the"])
def test_finders(how, what, tmp_path):
    """The search leaves the network as it was, and the fit after it compresses with what was found."""
    torch.manual_seed(1)
    model, learned = Tunable(), []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            learned.append([p.raw_depth.clone() for p in quantized_parameters(pl_module)])

    def trainer(*callbacks, schedule=MappingProxyType({0: SCHEDULE[0]})):
        return make_trainer(
            *callbacks, SelfCompression(gamma=0.01), Look(), Kill(schedule), max_epochs=4, default_root_dir=tmp_path
        )

    rate = what == "learning rate"
    finder = LearningRateFinder(num_training_steps=20) if rate else BatchSizeFinder(max_trials=3, steps_per_trial=2)
    if how.startswith("Tuner"):
        fitting = trainer()
        tuner = Tuner(fitting)
        if rate:
            tuner.lr_find(model, num_training=20)
        else:
            tuner.scale_batch_size(model, max_trials=3, steps_per_trial=2)
        fitting.fit(model)
    else:
        if "second" in how:
            trainer().fit(model)
            learned.clear()
        kept = [p.raw_depth.detach().clone() for p in quantized_parameters(model)]
        fitting = trainer(finder, schedule={} if "second" in how else {0: SCHEDULE[0]})
        fitting.fit(model)
    assert model.lr != 1e-3 if rate else model.batch_size == 8
    assert len(learned) == 1
    if "second" in how:
        assert all(torch.equal(a, b) for a, b in zip(learned[0], kept, strict=True))
    else:
        assert all(bool((depth == 8).all()) for depth in learned[0])
    assert_shrunk(model, fitting, channels=4, hidden=13)
