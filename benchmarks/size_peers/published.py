"""Published points of accuracy and bytes, for the plot: measured by their authors, in other trainings and counts."""

from typing import NamedTuple


class Point(NamedTuple):
    """A published network: percent of the test set, and bytes."""

    source: str
    accuracy: float
    nbytes: int


PUBLISHED = {
    "mnist": (
        Point("LeNet-5, MIRACLE", 99.04, 1_520),
        Point("LeNet-5, Oktay et al. 2020", 99.0, 2_840),
        Point("BitNetMCU", 99.28, 7_300),
        Point("BitNetMCU", 99.44, 9_300),
    ),
    "cifar": (
        Point("ResNet-20, HeterogeneousQuantization", 92.47, 70_000),
        Point("ResNet-20, LilNetX", 91.5, 66_000),
        Point("VGG-16, LilNetX", 90.0, 76_000),
    ),
}
