"""Exponents of activations in a fit: with whose optimizer they learn, and what is said of those there already."""

import logging

import pytest
import torch
from networks import Gan, Lit, batches, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression, calibrate_activations
from lightning_selfcompress.activations.layers import activated_modules, exponents_of


def fit(model, activations):
    compression = SelfCompression(gamma=0.01, activations=activations)
    make_trainer(compression, max_epochs=1, limit_train_batches=2).fit(model, batches())
    return compression


def calibrated(bits):
    model = Lit()
    calibrate_activations(model.net, [next(iter(batches()))[0]], bits=bits)
    return model


def bits_of(model):
    return {point.bits for _, part in activated_modules(model) for point in part._points}


def test_modules_without_parameters_learn_with_the_module_around_them():
    """A discriminator's ReLU is no part of the generator's step, though the generator's optimizer is the first."""
    model = Gan()
    optimizers = []

    class Looking(SelfCompression):
        def on_train_end(self, trainer, pl_module):
            optimizers.extend(self._depths._optimizers)
            super().on_train_end(trainer, pl_module)

    make_trainer(Looking(gamma=0.01, activations=8), max_epochs=1, limit_train_batches=2).fit(model, batches())
    owned = []
    for own in optimizers:
        held = {id(t) for group in own.adam.param_groups for t in group["params"]}
        owned.append({path for path, part in activated_modules(model) if id(exponents_of(part)) in held})
    assert owned == [{"generator.0", "generator.1"}, {"discriminator.0", "discriminator.1"}]


@pytest.mark.parametrize("asked", [8, None])
def test_activations_that_are_quantized_otherwise_are_told(asked):
    """A calibrated network goes on with its bits, with a warning where the callback was asked for others."""
    model = calibrated(bits=4)
    with pytest.warns(UserWarning, match=rf"activations={asked}\): this module quantizes activations in 4 bits"):
        fit(model, asked)
    assert bits_of(model) == {4}


def test_activations_that_are_quantized_as_asked_go_on(recwarn):
    """A calibrated network learns on from its step sizes, without a word."""
    model = calibrated(bits=8)
    before = {path: exponents_of(part).clone() for path, part in activated_modules(model)}
    fit(model, 8)
    after = {path: exponents_of(part) for path, part in activated_modules(model)}
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[path], after[path]) for path in before)
    assert not any("already" in str(warning.message) for warning in recwarn)


def test_layers_that_stay_in_float_are_told(caplog):
    """A layer whose forward is its own is named."""
    model = Lit()
    first = model.net[0]
    first.forward = lambda x: nn.Conv2d.forward(first, x)
    with caplog.at_level(logging.INFO, "lightning_selfcompress"):
        fit(model, 8)
    assert "which have a forward of their own: net.0." in caplog.text
    assert {path for path, _ in activated_modules(model)} == {"net.3", "net.5"}
