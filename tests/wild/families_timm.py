"""timm: a dozen architectures of image classifiers, made narrow."""

from typing import Any

import timm
import torch
from entry import Entry
from timm.models.convmixer import ConvMixer
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

SIDE = 32


def images(side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Images of one of four classes."""
    return torch.randn(2, 3, side, side), torch.randint(4, (2,))


def large() -> tuple[Tensor, Tensor]:
    """Images that are halved often."""
    return images(64)


def classify(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """The loss of a classifier with smoothed labels."""
    logits = net(batch[0])
    return F.cross_entropy(logits, batch[1], label_smoothing=0.1), logits


def _entry(name: str, architecture: str, *, batch: Any = images, **arguments: Any) -> Entry:
    def make() -> nn.Module:
        return timm.create_model(architecture, num_classes=4, **arguments)

    return Entry("timm", name, make, batch, classify)


TRANSFORMER = {"img_size": SIDE, "embed_dim": 32, "num_heads": 4, "depth": 2}
POOL = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 4}
MIXER = {"num_classes": 4, "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
ENTRIES = (
    _entry("ResNet", "resnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1), stem_width=16, batch=large),
    _entry("ResNet, bottleneck", "resnet50", channels=(8, 8, 16, 16), layers=(1, 1, 1, 1), batch=large),
    _entry("SE-ResNet", "seresnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1), batch=large),
    _entry("ConvNeXt", "convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), batch=large),
    _entry("EfficientNet", "tinynet_e", batch=large),
    _entry("MobileNetV3", "mobilenetv3_small_050", batch=large),
    _entry("MobileNetV4", "mobilenetv4_conv_small_035", batch=large),
    _entry("ViT", "vit_tiny_patch16_224", patch_size=8, **TRANSFORMER),
    _entry("DeiT", "deit_tiny_distilled_patch16_224", patch_size=8, **TRANSFORMER),
    _entry(
        "Swin",
        "swin_tiny_patch4_window7_224",
        img_size=SIDE,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    Entry("timm", "MLP-Mixer", lambda: MlpMixer(**MIXER), images, classify),
    _entry("RegNetX", "regnetx_002", batch=large),
    _entry("DenseNet", "densenet121", growth_rate=8, block_config=(2, 2), batch=large),
    _entry("GhostNet", "ghostnet_050", batch=large),
    Entry(
        "timm",
        "PoolFormer",
        lambda: MetaFormer(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=4),
        large,
        classify,
    ),
    Entry("timm", "ConvMixer", lambda: ConvMixer(32, 2, 5, 4, num_classes=4), images, classify),
    _entry("RepVGG", "repvgg_a0", batch=large),
    _entry("DLA", "dla46_c", batch=large),
)
