"""Averages of the weights beside SelfCompression: they lose the channels that the network loses."""

import lightning.pytorch as pl
import pytest
import torch
from compressing import Record, assert_shrunk, compress, survivors
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from networks import Lit, batches, trained_tensors

from lightning_selfcompress import convert
from lightning_selfcompress.files.checkpoint import take_shapes


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
    names = trained_tensors(model).keys() if not buffers else {n for n, t in state.items() if t.dim()}
    for name in names:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-5)
    images = next(iter(batches()))[0]
    expected = network_of(expected if buffers else {n: expected[n] if n in names else t for n, t in state.items()})
    torch.testing.assert_close(model.net.eval()(images), expected(images), rtol=1e-2, atol=1e-2)


AVERAGES = {
    "WeightAveraging": ({}, equal_weights),
    "EMAWeightAveraging": ({"decay": 0.9}, lambda average, value, n: 0.9 * average + 0.1 * value),
}


@pytest.mark.case("Other callbacks", "{name}, listed {place} SelfCompression")
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
def test_no_stale_weights_around_averages():
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

        def on_train_epoch_end(self, trainer, pl_module):
            compare(pl_module.eval())  # as for sample predictions; its quantized weights are kept
            pl_module.train()
            pl_module.net(next(iter(batches()))[0])

    settings = {"accumulate_grad_batches": 3, "val": batches(1), "val_check_interval": 25}
    model, trainer = compress(Compare(), first=[lightning_callbacks.WeightAveraging()], **settings)
    model.net.training = False  # by hand, without the walk over all layers that model.eval() is
    for layer in model.net:
        layer.training = False
    compare(model)
    assert_shrunk(model, trainer)
    assert len(differences) == 1 + 1 + 4 + 2
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
