"""The demo, which trains the same network on real images in float and with SelfCompression."""

from lightning_selfcompress.demo.data import DigitsData, MnistData
from lightning_selfcompress.demo.networks import DigitsNet, LeNet5

__all__ = ["DigitsData", "DigitsNet", "LeNet5", "MnistData"]
