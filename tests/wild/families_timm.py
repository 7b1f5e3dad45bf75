"""timm: a dozen architectures of image classifiers, made narrow."""

from typing import Any

import timm
import torch
from entry import Entry
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
ENTRIES = (
    _entry("ResNet", "resnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1), stem_width=16, batch=large),
    _entry("ResNet, bottleneck", "resnet50", channels=(8, 8, 16, 16), layers=(1, 1, 1, 1), batch=large),
    _entry("SE-ResNet", "seresnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1), batch=large),
    _entry("ConvNeXt", "convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), batch=large),
    _entry("EfficientNet", "efficientnet_b0", channel_multiplier=0.25, batch=large),
    _entry("MobileNetV3", "mobilenetv3_small_100", channel_multiplier=0.5, batch=large),
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
    _entry("MLP-Mixer", "mixer_s32_224", img_size=SIDE, patch_size=8, embed_dim=32, num_blocks=2),
    _entry("ResMLP", "resmlp_12_224", img_size=SIDE, patch_size=8, embed_dim=32, num_blocks=2),
    _entry("RegNetX", "regnetx_002", batch=large),
    _entry("DenseNet", "densenet121", growth_rate=8, block_config=(2, 2), num_init_features=16, batch=large),
    _entry("VGG", "vgg11_bn", batch=images, feature_window_size=1),
    _entry("GhostNet", "ghostnet_050", width=0.3, batch=large),
    _entry("PoolFormer", "poolformer_s12", embed_dims=(8, 16, 24, 32), layers=(1, 1, 1, 1), batch=large),
    _entry("RepVGG", "repvgg_a0", batch=large),
    _entry("ConvMixer", "convmixer_768_32", dim=32, depth=2, kernel_size=5, patch_size=4),
    _entry("DLA", "dla46_c", batch=large),
)
