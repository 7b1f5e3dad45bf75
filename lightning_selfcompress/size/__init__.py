"""The size of a network: a differentiable number of bits for training, and a report in whole bits and bytes."""

from lightning_selfcompress.size.price import ModelSize, size_bits
from lightning_selfcompress.size.report import LayerSize, SizeReport

__all__ = ["LayerSize", "ModelSize", "SizeReport", "size_bits"]
