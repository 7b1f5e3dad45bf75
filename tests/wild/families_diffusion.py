"""diffusers: networks that predict noise, and an autoencoder."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from entry import Entry
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}


def noisy() -> dict[str, Tensor]:
    """Images with noise, how much of it, and the noise."""
    return {
        "sample": torch.randn(2, 3, 16, 16),
        "timestep": torch.randint(1000, (2,)),
        "noise": torch.randn(2, 3, 16, 16),
    }


def described() -> dict[str, Tensor]:
    """The same with embedded text."""
    return noisy() | {"encoder_hidden_states": torch.randn(2, 6, 16)}


def labelled() -> dict[str, Tensor]:
    """The same with classes."""
    return noisy() | {"class_labels": torch.randint(4, (2,))}


def denoise(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of the noise."""
    inputs = {name: value for name, value in batch.items() if name not in ("sample", "noise")}
    noise = net(batch["sample"], **inputs, return_dict=False)[0]
    return F.mse_loss(noise, batch["noise"]), noise


def encode(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of a variational autoencoder."""
    latent = net.encode(batch["sample"]).latent_dist
    result = net.decode(latent.sample()).sample
    return F.mse_loss(result, batch["sample"]) + 1e-3 * latent.kl().mean(), result


ENTRIES = (
    Entry(
        "diffusers",
        "UNet2DModel",
        lambda: UNet2DModel(
            16,
            3,
            3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            **BLOCKS,
        ),
        noisy,
        denoise,
    ),
    Entry(
        "diffusers",
        "UNet2DConditionModel",
        lambda: UNet2DConditionModel(
            16,
            3,
            3,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            **BLOCKS,
        ),
        described,
        denoise,
    ),
    Entry(
        "diffusers",
        "DiT",
        lambda: DiTTransformer2DModel(4, 8, 3, num_layers=2, norm_num_groups=4, sample_size=16, num_embeds_ada_norm=4),
        labelled,
        denoise,
    ),
    Entry(
        "diffusers",
        "AutoencoderKL",
        lambda: AutoencoderKL(
            3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, latent_channels=4, **BLOCKS
        ),
        noisy,
        encode,
    ),
)
