"""Networks that compress themselves while they train: learned bit depths per output channel, in PyTorch Lightning."""

from lightning_selfcompress.callback import SelfCompression
from lightning_selfcompress.checkpoint import load_from_checkpoint, take_shapes
from lightning_selfcompress.convert import ConversionPlan, convert, plan_conversion, revert
from lightning_selfcompress.dryrun import prove
from lightning_selfcompress.export import export
from lightning_selfcompress.finalize import finalize, fold_batchnorm
from lightning_selfcompress.graph import Channels, Watcher
from lightning_selfcompress.load import load
from lightning_selfcompress.metrics import BitsPerWeight, NBytes
from lightning_selfcompress.onnx_export import OnnxReport, to_onnx
from lightning_selfcompress.optim import shrink_optimizer
from lightning_selfcompress.packing import PackedFileError
from lightning_selfcompress.prune import RemovalPlan, plan_removal
from lightning_selfcompress.quantizer import bit_depth, q
from lightning_selfcompress.shapes import CheckpointError
from lightning_selfcompress.size import SizeReport, size_report
from lightning_selfcompress.surgery import remove

__version__ = "0.1.0"

__all__ = [
    "BitsPerWeight",
    "Channels",
    "CheckpointError",
    "ConversionPlan",
    "NBytes",
    "OnnxReport",
    "PackedFileError",
    "RemovalPlan",
    "SelfCompression",
    "SizeReport",
    "Watcher",
    "bit_depth",
    "convert",
    "export",
    "finalize",
    "fold_batchnorm",
    "load",
    "load_from_checkpoint",
    "plan_conversion",
    "plan_removal",
    "prove",
    "q",
    "remove",
    "revert",
    "shrink_optimizer",
    "size_report",
    "take_shapes",
    "to_onnx",
]
