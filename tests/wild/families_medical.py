"""monai: networks of volumes and images, trained to segment or to classify."""

from collections.abc import Callable
from typing import Any

import torch
from entry import Entry
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def images(size: int, dims: int = 2, channels: int = 1) -> Callable[[], tuple[Tensor, Tensor]]:
    """Images with a class at each pixel."""
    shape = (size,) * dims
    return lambda: (torch.randn(2, channels, *shape), torch.randint(3, (2, *shape)))


def classified() -> tuple[Tensor, Tensor]:
    """Images of one of three classes."""
    return torch.randn(2, 1, 32, 32), torch.randint(3, (2,))


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """The loss of the classes, of pixels or images."""
    logits = net(batch[0])
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    return F.cross_entropy(logits, batch[1]), logits


def reconstruction(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
    """The loss of images that are to be reconstructed."""
    result = net(batch[0])
    return F.mse_loss(result, batch[0]), result


def _entry(name: str, make: Callable[[], nn.Module], batch: Any, loss: Any = loss) -> Entry:
    return Entry("monai", name, make, batch, loss)


ENTRIES = (
    _entry(
        "UNet",
        lambda: nets.UNet(2, 1, 3, channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
        images(32),
    ),
    _entry("BasicUNet", lambda: nets.BasicUNet(2, 1, 3, features=(8, 8, 16, 16, 32, 8)), images(32)),
    _entry("AttentionUnet", lambda: nets.AttentionUnet(2, 1, 3, channels=(8, 16, 32), strides=(2, 2)), images(32)),
    _entry(
        "SegResNet",
        lambda: nets.SegResNet(3, 8, 1, 3, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        images(16, 3),
    ),
    _entry(
        "SwinUNETR",
        lambda: nets.SwinUNETR(
            in_channels=1,
            out_channels=3,
            feature_size=12,
            depths=(1, 1, 1, 1),
            spatial_dims=2,
            window_size=4,
            num_heads=(1, 2, 3, 4),
        ),
        images(64),
    ),
    _entry(
        "UNETR",
        lambda: nets.UNETR(1, 3, (32, 32), feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4, spatial_dims=2),
        images(32),
    ),
    _entry(
        "DynUNet",
        lambda: nets.DynUNet(2, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
        images(32),
    ),
    _entry(
        "DenseNet",
        lambda: nets.DenseNet(2, 1, 3, init_features=16, growth_rate=8, block_config=(2, 2)),
        classified,
    ),
    _entry(
        "ResNet",
        lambda: nets.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], spatial_dims=2, n_input_channels=1, num_classes=3),
        classified,
    ),
    _entry(
        "AutoEncoder", lambda: nets.AutoEncoder(2, 1, 1, channels=(8, 16), strides=(2, 2)), classified, reconstruction
    ),
)
