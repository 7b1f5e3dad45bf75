"""Fits of networks with attention, whose heads go while they train."""

import lightning.pytorch as pl
import pytest
import torch
from networks import Regression, make_trainer, sequences
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress import SelfCompression, finalize, load_from_checkpoint
from lightning_selfcompress.quantize.parameters import quantized_parameters


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.num_heads, self.all_head_size = 3, 12

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.num_heads, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(*x.shape[:2], self.all_head_size))


class Lit(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.attention, self.head = (
            nn.Linear(4, 12),
            nn.LayerNorm(12),
            Attention(),
            nn.Linear(12, 2),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attention(self.norm(x)))


class Kill(pl.Callback):
    """Once, after the first batch: one head dies."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            for p in quantized_parameters(module.attention.qkv):
                p.raw_depth.data[[12 * i + j for i in range(3) for j in range(4)]] = -1


def fit(epochs, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    module = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.01), *callbacks, max_epochs=epochs)
    trainer.fit(module, torch.utils.data.DataLoader(sequences(), batch_size=None), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that has lost a head, and its checkpoint."""
    module, trainer = fit(2, Kill())
    path = tmp_path_factory.mktemp("heads") / "net.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_a_head_goes_in_a_fit(trained):
    """A dead head is gone after the epoch, with its attributes, and the training goes on."""
    module, _ = trained
    assert module.attention.qkv.weight.shape == (24, 12)
    assert (module.attention.num_heads, module.attention.all_head_size) == (2, 8)


def test_checkpoints_know_the_attributes(trained):
    """A checkpoint opens as the network that wrote it, and a training that is resumed from it goes on."""
    module, path = trained
    x = sequences(1)[0][0]
    opened = load_from_checkpoint(Lit, path)
    assert torch.equal(opened.eval()(x), module.eval()(x))
    assert torch.allclose(finalize(opened).eval()(x), module(x))
    resumed, _ = fit(3, ckpt_path=path)
    assert resumed.attention.num_heads == 2
    assert resumed.attention.qkv.weight.shape == (24, 12)


def test_a_larger_checkpoint_brings_the_first_attributes_back(trained, tmp_path):
    """A network that has lost a head and takes up a checkpoint from before has all its heads again."""
    full, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    saved = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    small = load_from_checkpoint(Lit, trained[1])
    small.load_state_dict(saved)
    x = sequences(1)[0][0]
    assert small.attention.num_heads == 3
    assert torch.equal(small.eval()(x), full.eval()(x))
