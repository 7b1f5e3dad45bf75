"""Fits of recurrent networks, whose hidden channels go while they train."""

import lightning.pytorch as pl
import pytest
import torch
from networks import Regression, make_trainer, sequences
from torch import nn

from lightning_selfcompress import SelfCompression, load_from_checkpoint
from lightning_selfcompress.quantize.parameters import quantized_parameters


class Lit(Regression):
    """An encoder, whose state starts at zeros of a width of this module, and a decoder that goes on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.head = 6, nn.Linear(6, 2)
        self.encoder, self.decoder = (nn.LSTM(4, 6, batch_first=True) for _ in range(2))

    def forward(self, x):
        start = torch.zeros(1, len(x), self.hidden_size, device=x.device)
        _, state = self.encoder(x, (start, start))
        return self.head(self.decoder(x, state)[0])


class Kill(pl.Callback):
    """Once, after the first batch: two hidden channels die, in every gate of both layers."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            for layer in (module.encoder, module.decoder):
                for p in quantized_parameters(layer):
                    p.raw_depth.data.view(4, 6)[:, [0, 3]] = -1


def fit(epochs, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    module = Lit()
    trainer = make_trainer(SelfCompression(gamma=0.01), *callbacks, max_epochs=epochs)
    trainer.fit(module, torch.utils.data.DataLoader(sequences(), batch_size=None), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("weights_only", [False, True])
def test_hidden_channels_go_in_a_fit(weights_only, tmp_path):
    """Dead hidden channels are gone after the epoch, and a network from the checkpoint has the widths it needs."""
    module, trainer = fit(2, Kill())
    assert (module.hidden_size, module.encoder.hidden_size, module.decoder.hidden_size) == (4, 4, 4)
    assert module.decoder.weight_hh_l0.shape == (16, 4)
    path = tmp_path / "net.ckpt"
    trainer.save_checkpoint(path, weights_only=weights_only)
    opened, x = load_from_checkpoint(Lit, path), torch.randn(3, 5, 4)
    assert torch.equal(opened.eval()(x), module.eval()(x))
    if not weights_only:
        resumed, _ = fit(3, ckpt_path=path)
        assert resumed.hidden_size == 4
