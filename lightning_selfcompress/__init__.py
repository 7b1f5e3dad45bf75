"""Networks that compress themselves while they train: learned bit depths per output channel, in PyTorch Lightning.

The folders, in the order in which a weight passes through them; each imports only those before it:

- ``quantize``: the quantizer and the layers that apply it, converted in place.
- ``activations``: what layers read and return, in integers too.
- ``packing``: the integer codes of a network, as bytes and back.
- ``channels``: which channels live and die together, read off the steps that a network runs.
- ``size``: the price of a network while it trains, and the report of its size.
- ``running_statistics``: the statistics of batch normalization, estimated anew.
- ``removal``: dead channels taken out of a network and of its optimizers, after a dry run.
- ``files``: checkpoints, packed files, and plain networks.
- ``onnx``: ONNX files with integer weights.
- ``training``: everything that touches Lightning, for the callback in ``callback.py``.
- ``monitoring``: what a training shows of itself.
- ``reporting``: one page about a run, and the checkpoints that no other beats in metric and bytes.
- ``cli`` and ``demo``: the command ``selfcompress``, and its demonstration on real images.

Every public name is imported when it is first asked for, so that loading a packed file needs torch and numpy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_selfcompress.activations.calibrate import calibrate_activations
    from lightning_selfcompress.callback import SelfCompression
    from lightning_selfcompress.errors import CheckpointError, PackedFileError, RunError, SelfCompressError
    from lightning_selfcompress.files.checkpoint import load_from_checkpoint
    from lightning_selfcompress.files.export import export
    from lightning_selfcompress.files.finalize import finalize
    from lightning_selfcompress.files.fold_batchnorm import fold_batchnorm
    from lightning_selfcompress.files.load import load
    from lightning_selfcompress.metrics import BitsPerWeight, NBytes
    from lightning_selfcompress.monitoring.objective import Objective
    from lightning_selfcompress.onnx.export import to_onnx
    from lightning_selfcompress.quantize.channel_axis import ChannelAxis
    from lightning_selfcompress.quantize.conversion_plan import plan_conversion
    from lightning_selfcompress.quantize.convert import convert, revert
    from lightning_selfcompress.quantize.registry import register_layer
    from lightning_selfcompress.removal.remove_dead_channels import remove_dead_channels
    from lightning_selfcompress.reporting.compression_report import CompressionReport
    from lightning_selfcompress.reporting.pareto_checkpoint import ParetoCheckpoint
    from lightning_selfcompress.running_statistics import recalibrate
    from lightning_selfcompress.size.report import size_report
    from lightning_selfcompress.training.teacher import Teacher

__version__ = "0.1.0"

_HOMES = {
    "BitsPerWeight": "metrics",
    "ChannelAxis": "quantize.channel_axis",
    "CheckpointError": "errors",
    "CompressionReport": "reporting.compression_report",
    "NBytes": "metrics",
    "Objective": "monitoring.objective",
    "PackedFileError": "errors",
    "ParetoCheckpoint": "reporting.pareto_checkpoint",
    "RunError": "errors",
    "SelfCompressError": "errors",
    "SelfCompression": "callback",
    "Teacher": "training.teacher",
    "calibrate_activations": "activations.calibrate",
    "convert": "quantize.convert",
    "export": "files.export",
    "finalize": "files.finalize",
    "fold_batchnorm": "files.fold_batchnorm",
    "load": "files.load",
    "load_from_checkpoint": "files.checkpoint",
    "plan_conversion": "quantize.conversion_plan",
    "recalibrate": "running_statistics",
    "register_layer": "quantize.registry",
    "remove_dead_channels": "removal.remove_dead_channels",
    "revert": "quantize.convert",
    "size_report": "size.report",
    "to_onnx": "onnx.export",
}

__all__ = [
    "BitsPerWeight",
    "ChannelAxis",
    "CheckpointError",
    "CompressionReport",
    "NBytes",
    "Objective",
    "PackedFileError",
    "ParetoCheckpoint",
    "RunError",
    "SelfCompressError",
    "SelfCompression",
    "Teacher",
    "calibrate_activations",
    "convert",
    "export",
    "finalize",
    "fold_batchnorm",
    "load",
    "load_from_checkpoint",
    "plan_conversion",
    "recalibrate",
    "register_layer",
    "remove_dead_channels",
    "revert",
    "size_report",
    "to_onnx",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its file, at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
