"""Networks that compress themselves while they train: learned bit depths per output channel, in PyTorch Lightning."""

from lightning_selfcompress.callback import SelfCompression
from lightning_selfcompress.convert import ConversionPlan, convert, plan_conversion, revert
from lightning_selfcompress.metrics import BitsPerWeight, NBytes
from lightning_selfcompress.quantizer import bit_depth, q
from lightning_selfcompress.size import SizeReport, size_report

__version__ = "0.1.0"

__all__ = [
    "BitsPerWeight",
    "ConversionPlan",
    "NBytes",
    "SelfCompression",
    "SizeReport",
    "bit_depth",
    "convert",
    "plan_conversion",
    "q",
    "revert",
    "size_report",
]
