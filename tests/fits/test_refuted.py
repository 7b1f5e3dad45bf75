"""After a removal that the dry run refutes, training goes on as if the channels had been known to stay."""

import pytest
import torch
from fits import Kill, data
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Lit, make_trainer
from torch import nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.size.price import ModelSize


class Regrouped(Lit):
    """The convolution's channels are regrouped by a number in the code."""

    def loss(self, batch):
        hidden = self.net[:3](batch[0])
        return nn.functional.cross_entropy(self.net[3:](hidden.view(-1, 2, 3, 36).flatten(1, 2)), batch[1])


class Scaled(Lit):
    """The hidden layer is scaled by its own width."""

    def loss(self, batch):
        hidden = self.net[:6](batch[0])
        return nn.functional.cross_entropy(self.net[6](hidden * (16 / hidden.shape[1])), batch[1])


CASES = [(Regrouped, {0: {"net.0": [1, 4]}}), (Scaled, {0: {"net.4": [0, 7]}})]


def run(make, schedule, folder, ckpt_path=None, epochs=3, price="bytes"):
    torch.manual_seed(1)
    model = make()
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    compression = SelfCompression(gamma=0.5, bits_lr=0.001, price=price)
    callbacks = [compression, saving, *([Kill(schedule)] if ckpt_path is None else [])]
    trainer = make_trainer(*callbacks, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(model, data(torch.float32), ckpt_path=ckpt_path)
    return model, compression


@pytest.mark.parametrize(("make", "schedule"), CASES)
def test_resumed_equals_straight(make, schedule, tmp_path):
    """A run resumed after the refuted removal ends as the one that was not stopped, to the bit."""
    straight, _ = run(make, schedule, tmp_path / "straight")
    assert (straight.net[0].out_channels, straight.net[4].out_features) == (6, 16)
    for epoch in (0, 1):
        resumed, _ = run(make, schedule, tmp_path / f"{epoch}", tmp_path / "straight" / f"epoch={epoch}.ckpt")
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize(("make", "schedule"), CASES)
def test_refuted_channels_pay_for_themselves_alone(make, schedule, tmp_path):
    """Channels that can never go do not pay for their consumers' weights, and their constants do not fade."""
    model, compression = run(make, schedule, tmp_path, epochs=1, price="bits")
    (layer,) = schedule[0]
    channels = compression._removal.channels
    assert not channels.removable()[channels.of(f"{layer}.bit_depth", 0)].any()
    (gradient,) = (
        g
        for p, g in zip(ModelSize.of(model).parameters, ModelSize.of(model).gradients(1.0), strict=True)
        if p.name == f"{layer}.weight"
    )
    own = model.get_submodule(layer).latent("weight")[0].numel() / sum(
        p.spec.original_numel for p in ModelSize.of(model).parameters
    )
    living = model.get_submodule(layer).bit_depth > 0
    assert torch.allclose(gradient[living], torch.full_like(gradient[living], own))
    before = model.get_submodule(layer).bias.detach().clone()
    compression._removal._fading.step()
    assert torch.equal(model.get_submodule(layer).bias, before)
