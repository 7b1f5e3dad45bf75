"""The networks of the comparisons, each a function that makes one with initial weights from torch's generator."""

from collections.abc import Callable

from cifar import resnet
from torch import nn


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


def lenet(*widths: int) -> nn.Sequential:
    """LeNet-5 of any widths.

    Args:
        widths: Output channels of both convolutions and of the first linear layer.
    """
    first, second, third = widths
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * second, third), nn.ReLU(), nn.Linear(third, 10)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: lenet(20, 50, 500),  # the demo's
    "lenet_8_9_20": lambda: lenet(8, 9, 20),  # about the widths that LeNet-5 ends with at 1,000 bytes
    "lenet_10_20_40": lambda: lenet(10, 20, 40),
    "small": lambda: small(4, 8, 8, 12),
    "resnet20": lambda: resnet("resnet20"),
}
