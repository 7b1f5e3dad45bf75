"""Fits with activations in 8 bits: learned, resumed, removed around, saved and loaded to the bit."""

import lightning.pytorch as pl
import pytest
import torch
from fits import Kill, data
from networks import Gan, Lit, batches, make_trainer, small_net
from torch import nn

from lightning_selfcompress import SelfCompression, export, load, load_from_checkpoint
from lightning_selfcompress.activations.layers import activated_modules, activations_off, exponents_of


class Residual(nn.Module):
    """Convolutions around a skip, with one ReLU module that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm_b(self.b(self.relu(self.norm_a(self.a(x)))))
        out += x
        return self.relu(out)


def resnet():
    first = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*first, Residual(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))


class LitResidual(Lit):
    def __init__(self):
        super().__init__()
        self.net = resnet()


def fit(make=Lit, *callbacks, epochs=2, train=None, val=None, ckpt_path=None, options=None, **settings):
    torch.manual_seed(1)
    model = make()
    compression = SelfCompression(gamma=0.01, **({"activations": 8} | (options or {})))
    trainer = make_trainer(compression, *callbacks, max_epochs=epochs, **settings)
    trainer.fit(model, batches() if train is None else train, val, ckpt_path=ckpt_path, weights_only=False)
    return model, trainer


def exponents(model):
    return {path: exponents_of(part).tolist() for path, part in activated_modules(model)}


def moved(model, start):
    """Which exponents have learned; that of data does not, as its gradient would cost that of the first layer."""
    return {path for path, values in exponents(model).items() if values != exponents(start)[path]}


def places(model):
    return {(path, p.where, p.signed) for path, part in activated_modules(model) for p in part._points}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Lit, {("net.0", "input", True), ("net.3", "output", False), ("net.5", "output", False)}),
        (
            LitResidual,
            {
                ("net.0", "input", True),
                ("net.2", "output", False),
                ("net.3.b", "input", False),
                ("net.3.norm_b", "output", True),
                ("net.3", "output", False),
                ("net.5", "output", False),
            },
        ),
    ],
)
def test_activations_are_quantized_and_learned(make, expected, tmp_path):
    """The first step shows the places, exponents learn, and a file computes what the network does, to the bit."""
    start, _ = fit(make, options={"bits_lr": 0})
    model, _ = fit(make)
    assert places(model) == places(start) == expected
    assert moved(model, start) == {path for path, _, _ in expected} - {"net.0"}
    assert len(list(model.parameters())) == len(list(make().parameters()))
    images = next(iter(batches()))[0]
    model.eval()
    with activations_off():
        in_float = model.net(images)
    assert not torch.equal(in_float, model.net(images))
    export(model.net, tmp_path / "net")
    plain = load(tmp_path / "net", into=make().net).eval()
    assert torch.equal(plain(images), model.net(images))


def test_without_the_argument_nothing_is_quantized():
    """None, the default, leaves activations in float."""
    model, _ = fit(options={"activations": None})
    assert exponents(model) == {}


def test_resumed_equals_uninterrupted(tmp_path):
    """A training that goes on from a checkpoint ends with the same bits as one that was not interrupted."""
    saved = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, _ = fit(LitResidual, saved, epochs=3, enable_checkpointing=True)
    resumed, _ = fit(LitResidual, epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    values = whole.state_dict(), resumed.state_dict()
    assert list(values[0]) == list(values[1])
    assert all(torch.equal(a, b) for a, b in zip(*(v.values() for v in values), strict=True))
    restored = load_from_checkpoint(LitResidual, tmp_path / "epoch=2.ckpt", weights_only=False).eval()
    images = next(iter(batches()))[0]
    assert torch.equal(restored.net(images), whole.eval().net(images))


def test_dead_channels_leave_around_quantizers():
    """Channels that die are removed as without activations, and all places stay."""
    schedule = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}
    train = data(torch.float32)
    widths = []
    for activations in (None, 8):
        model, _ = fit(Lit, Kill(schedule), train=train, val=batches(2), options={"activations": activations})
        widths.append((model.net[0].out_channels, model.net[4].in_features, model.net[4].out_features))
    assert widths == [(4, 4 * 36, 13)] * 2
    assert len(exponents(model)) == 3


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision):
    """Exponents learn in at least float32 under mixed precision and in double precision."""
    start, _ = fit(options={"bits_lr": 0}, precision=precision)
    model, _ = fit(precision=precision)
    assert moved(model, start) == {"net.3", "net.5"}
    dtypes = {exponents_of(part).dtype for _, part in activated_modules(model)}
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}


def test_accumulated_batches_step_once():
    """Exponents move with the optimizer's steps, not with batches."""
    model, trainer = fit(epochs=1, accumulate_grad_batches=4)
    (own,) = next(c for c in trainer.callbacks if isinstance(c, SelfCompression))._depths._optimizers
    learned = [exponents_of(part) for path, part in activated_modules(model) if path != "net.0"]
    steps = {int(own.adam.state[exponent]["step"]) for exponent in learned}
    assert steps == {2}


def test_several_optimizers():
    """In manual optimization each exponent learns with the optimizer of its own network."""
    model, trainer = fit(Gan)
    compression = next(c for c in trainer.callbacks if isinstance(c, SelfCompression))
    for optimizer, own in zip(("generator", "discriminator"), compression._depths._optimizers, strict=True):
        held = {id(t) for group in own.adam.param_groups for t in group["params"]}
        mine = {path for path, part in activated_modules(model) if id(exponents_of(part)) in held}
        assert mine == {f"{optimizer}.0", f"{optimizer}.1"}


def test_averages_quantize_too():
    """A moving average has the same places, and exponents of its own that follow."""
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    seen = {}

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            seen["average"] = exponents(average._average_model.module)
            seen["module"] = exponents(pl_module)

    fit(Lit, Look(), average)
    assert seen["average"].keys() == seen["module"].keys() != set()
    assert all(seen["average"][path] != seen["module"][path] for path in ("net.3", "net.5"))
    assert seen["average"]["net.0"] == seen["module"]["net.0"]  # of data


def test_a_step_that_cannot_be_repeated_is_told():
    """Where the first step does not run on a copy, activations stay in float, with the remedy."""

    class Once(Lit):
        def training_step(self, batch, batch_idx):
            if not isinstance(self.trainer, pl.Trainer):
                raise RuntimeError("only for the Trainer")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"activations stay in float\. calibrate_activations quantizes those"):
        model, _ = fit(Once, options={"prune_every_n_epochs": 0})
    assert exponents(model) == {}


def test_small_net_has_the_places_of_the_lightning_module():
    """What a fit quantizes is what calibration of the plain network quantizes."""
    from lightning_selfcompress import calibrate_activations

    net = calibrate_activations(small_net(), [next(iter(batches()))[0]])
    model, _ = fit()
    assert {(f"net.{path}", *rest) for path, *rest in places(net)} == places(model)
