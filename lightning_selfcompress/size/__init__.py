"""The size of a network: differentiable in bits while it trains, in whole bytes when it is reported."""

from lightning_selfcompress.size.price import ModelSize, size_bits
from lightning_selfcompress.size.report import LayerSize, SizeReport

__all__ = ["LayerSize", "ModelSize", "SizeReport", "size_bits"]
