"""segmentation-models-pytorch: decoders around an encoder."""

from typing import Any

import segmentation_models_pytorch as smp
import torch
from entry import Entry
from torch import Tensor, nn

ENCODER = {"encoder_name": "timm-mobilenetv3_small_minimal_100", "encoder_weights": None, "classes": 3}
SMALL = {"decoder_channels": (32, 16, 16, 8, 8)}


def images() -> tuple[Tensor, Tensor]:
    """Images with a class at each pixel."""
    return torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))


def dice(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """The Dice loss."""
    logits = net(batch[0])
    return smp.losses.DiceLoss("multiclass")(logits, batch[1]), logits


def _entry(name: str, **arguments: Any) -> Entry:
    def make() -> nn.Module:
        return getattr(smp, name)(**ENCODER, **arguments)

    return Entry("segmentation-models", name, make, images, dice)


ENTRIES = (
    _entry("Unet", **SMALL),
    _entry("UnetPlusPlus", **SMALL),
    _entry("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    _entry("Linknet"),
)
