"""Layers of types that nobody told of, found by what they do in the first training step of a fit."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from networks import make_trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it
from torch.utils.data import DataLoader

from lightning_selfcompress import (
    CheckpointError,
    SelfCompression,
    export,
    finalize,
    load,
    load_from_checkpoint,
    register_layer,
    size_report,
)
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters


class Conv1D(nn.Module):
    """A layer with a weight ``(inputs, outputs)`` that repeats its widths, as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)

    def forward(self, x):
        return torch.mm(x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """Experts in three-dimensional weights, of which a batch may not reach all."""

    def __init__(self, experts=3, width=16, hidden=8):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 4)

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        hidden = torch.einsum("bd,edh->ebh", x, self.up).relu()
        outputs = [F.linear(hidden[i], self.down[i]) for i in range(len(hidden))]
        return torch.einsum("be,ebd->bd", share, torch.stack(outputs))


class Mixed(pl.LightningModule):
    """A network of layers that torch does not define, with one weight of the module itself."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = Conv1D(16, 8)
        self.experts = Experts()
        self.own = nn.Parameter(torch.randn(16, 16) / 4)
        self.last = Conv1D(4, 16)
        self.position = nn.Parameter(torch.zeros(1, 8))
        self.unused = Conv1D(4, 16)

    def forward(self, x):
        return self.last((self.experts(self.first(x + self.position).relu()) @ self.own).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"]), batch["y"])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


FOUND = {"first.weight", "experts.up", "experts.down", "experts.gate.weight", "own", "last.weight", "unused.weight"}


class Kill(pl.Callback):
    """Brings some depths to zero after the first step, alike for all experts."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            for p in quantized_parameters(pl_module):
                if p.name in ("first.weight", "experts.up", "own"):
                    p.raw_depth.data.view(p.spec.axis.groups, -1)[:, 1::4] = 0.0
                    p.layer.forget_quantized()


def batches():
    torch.manual_seed(1)
    return DataLoader([{"x": torch.randn(6, 8), "y": torch.randint(4, (6,))} for _ in range(3)], batch_size=None)


def fit(module, *callbacks, ckpt_path=None, epochs=1, **arguments):
    trainer = make_trainer(SelfCompression(**{"gamma": 0.0, "bits_lr": 0.0} | arguments), *callbacks, max_epochs=epochs)
    trainer.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return trainer


def names(module):
    return {p.name for p in quantized_parameters(module)}


@pytest.fixture
def x():
    torch.manual_seed(2)
    return torch.randn(5, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fitted module whose found layers have lost channels, its full checkpoint and one of weights alone."""
    module = Mixed()
    trainer = fit(module, Kill())
    folder = tmp_path_factory.mktemp("found")
    trainer.save_checkpoint(folder / "full.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return module, folder


class TestFit:
    """What a fit does to layers that it finds."""

    def test_layers_are_found_and_told(self, caplog):
        """Each weight is quantized along its output channels, the plan says so, and the rest has its reason."""
        module = Mixed()
        before = list(module.parameters())
        with caplog.at_level(logging.INFO):
            fit(module)
        assert names(module) == FOUND
        assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
        channels = {p.name: p.channels for p in quantized_parameters(module)}
        assert (channels["first.weight"], channels["own"]) == (16, 16)
        assert (channels["experts.up"], channels["experts.down"], channels["last.weight"]) == (3 * 8, 3 * 16, 4)
        assert "found by what they do in the first training step" in caplog.text
        assert "'experts' (Experts: channels of up along dimension 2, in 3 groups along dimension 0" in caplog.text

    def test_starts_at_the_float_function(self):
        """The first step is done with 8 bits of the weights as they are, before anything was trained."""
        losses = []

        class Noting(Mixed):
            def training_step(self, batch, batch_idx):
                losses.append((len(names(self)), super().training_step(batch, batch_idx)))
                return losses[-1][1]

        fit(Noting())
        module = Mixed()
        expected = module.training_step(next(iter(batches())), 0)
        first = next(loss for count, loss in losses if count == len(FOUND))
        assert abs(float(first - expected)) < 0.02
        assert first is losses[-3][1]  # the first of three steps

    def test_depths_are_trained(self):
        """Depths of found layers are trained from the first step on."""
        module = Mixed()
        fit(module, gamma=1.0, price="bits", bits_lr=0.05)
        moved = {p.name for p in quantized_parameters(module) if (p.raw_depth < 7.9).any()}
        assert moved == FOUND - {"unused.weight"}

    def test_dead_channels_go(self, trained):
        """Dead channels of found layers leave them, their consumers and the widths that they repeat."""
        module, _ = trained
        assert module.first.weight.shape == (8, 12)
        assert (module.first.nf, module.first.nx, module.last.nx) == (12, 8, 12)
        assert module.experts.up.shape == (3, 12, 6)
        assert module.experts.down.shape == (3, 16, 6)
        assert module.own.shape == (16, 12)

    def test_network_without_a_known_layer(self):
        """A network that has nothing else than layers to be found is compressed."""
        module = Mixed()
        module.experts = nn.Identity()
        fit(module, price="bytes")
        assert names(module) == FOUND - {"experts.up", "experts.down", "experts.gate.weight"}

    def test_skip(self):
        """What ``skip`` names stays in float, whatever it does."""
        module = Mixed()
        fit(module, skip=[Experts, "first"])
        assert names(module) == {"own", "last.weight", "unused.weight"}

    def test_nothing_found(self):
        """If the first step shows that there is nothing to compress, the error has the reasons."""

        class Bare(Mixed):
            def forward(self, x):
                return (x[:, :4] + self.position[:, :4]) * 2

        module = Bare()
        del module.experts
        with pytest.raises(ValueError, match=r"in Bare, found nothing(.|\n)*position was in no matrix product"):
            fit(module)

    def test_step_that_cannot_be_run_on_a_copy(self):
        """If the step fails on a copy, a warning says so, and the known layers are trained."""

        class Once(Mixed):
            def training_step(self, batch, batch_idx):
                if type(self).__name__.startswith("DryRun"):
                    raise RuntimeError("only once")
                return super().training_step(batch, batch_idx)

        module = Once()
        with pytest.warns(UserWarning, match=r"could not be run on a copy \(RuntimeError: only once\)"):
            fit(module)
        assert names(module) == {"experts.gate.weight"}

    def test_second_fit(self):
        """A module that is trained on keeps its quantized layers."""
        module = Mixed()
        fit(module)
        depth = module.first.bit_depth
        fit(module)
        assert module.first.bit_depth is depth
        assert names(module) == FOUND


class TestFiles:
    """Files of found layers, which are opened without a step."""

    @pytest.mark.parametrize("file", ["full.ckpt", "weights.ckpt"])
    def test_load_from_checkpoint(self, trained, x, file):
        """A checkpoint opens as the smaller network with its quantized layers."""
        module, folder = trained
        loaded = load_from_checkpoint(Mixed, folder / file)
        assert names(loaded) == FOUND
        assert torch.equal(loaded(x), module(x))
        assert isinstance(loaded.experts, Quantized)

    def test_resume(self, trained):
        """A fit goes on from a checkpoint with the layers found before."""
        module, folder = trained
        resumed = Mixed(seed=5)
        fit(resumed, ckpt_path=folder / "full.ckpt", epochs=2)
        assert names(resumed) == FOUND
        assert resumed.first.weight.shape == module.first.weight.shape
        assert (resumed.own_bit_depth == 8).all()

    def test_resume_loads_the_depths(self, trained, tmp_path):
        """Depths come from the checkpoint, those of the module's own weight included."""
        _, folder = trained
        checkpoint = torch.load(folder / "full.ckpt", weights_only=True)
        for name in ("own_bit_depth", "first.bit_depth"):
            checkpoint["state_dict"][name].fill_(5.5)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        resumed, seen = Mixed(seed=5), []

        class Look(pl.Callback):
            def on_fit_start(self, trainer, pl_module):
                seen.extend((m.depths_loaded, m.pristine) for m in (pl_module, pl_module.first))

        fit(resumed, Look(), ckpt_path=tmp_path / "changed.ckpt")
        assert seen == [(True, False)] * 2
        assert resumed.own_bit_depth.tolist() == [5.5] * 12
        assert resumed.first.bit_depth.tolist() == [5.5] * 12

    def test_validate_from_a_checkpoint(self, trained):
        """A float module is validated as the network in the checkpoint."""
        module, folder = trained
        trainer = make_trainer(SelfCompression(gamma=0.0))
        other = Mixed(seed=5)
        trainer.validate(other, batches(), ckpt_path=folder / "full.ckpt", verbose=False)
        assert names(other) == FOUND
        assert torch.equal(other.own, module.own)

    def test_skip_of_another_run(self, trained):
        """A checkpoint in which a skipped layer is quantized is refused, and the module stays as it was."""
        _, folder = trained
        module = Mixed(seed=5)
        with pytest.raises(CheckpointError, match=r"'first' to be float.*same skip="):
            fit(module, ckpt_path=folder / "full.ckpt", skip=["first"])
        assert not isinstance(module, Quantized)
        assert module.own.shape == (16, 16)

    def test_packed_file(self, trained, x, tmp_path):
        """A packed file has the reported size and opens as the plain network, widths included."""
        module, _ = trained
        assert export(module, tmp_path / "net.scnn").nbytes == size_report(module).nbytes
        plain = load(tmp_path / "net.scnn", into=Mixed(seed=5))
        assert torch.equal(plain(x), module(x))
        assert (type(plain), plain.first.nf, plain.last.nx) == (Mixed, 12, 12)

    def test_finalize(self, trained, x):
        """The plain network computes the same outputs."""
        module, _ = trained
        plain = finalize(module)
        assert type(plain.experts) is Experts
        assert torch.equal(plain(x), module(x))


def test_registered_layer_of_a_fit():
    """A registered layer is converted before the first step, also where no step could show what it does."""

    class Named(Conv1D):
        pass

    register_layer(Named, weight=1)
    module = Mixed()
    module.unused = Named(4, 16)

    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            assert isinstance(pl_module.unused, Quantized)

    fit(module, Look())
    assert isinstance(module.unused, Quantized)
