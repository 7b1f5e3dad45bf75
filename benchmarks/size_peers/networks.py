"""The networks of the comparisons, each a function that makes one with initial weights from torch's generator."""

from collections.abc import Callable

from cifar import resnet
from torch import nn

from lightning_selfcompress.demo.networks import LeNet5


def small(*widths: int) -> nn.Sequential:
    """Four 3x3 convolutions with BatchNorm for images of 28x28 pixels, and one linear layer after average pooling.

    Args:
        widths: Output channels of the four convolutions.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if index in (1, 2):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: LeNet5().net,
    "small": lambda: small(4, 8, 8, 12),
    "resnet20": lambda: resnet("resnet20"),
}
