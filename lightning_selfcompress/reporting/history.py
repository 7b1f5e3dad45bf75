"""The record of one run, which its report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_selfcompress.monitoring.scalars import PREFIX
from lightning_selfcompress.quantize.parameters import QuantizedParameter
from lightning_selfcompress.reporting.front import Mode, Point, front
from lightning_selfcompress.size.operations import uses_of
from lightning_selfcompress.size.report import LayerSize, SizeReport

NBYTES = f"{PREFIX}/nbytes"  # the scalar without which a run is not one of this package
FLOAT_NBYTES = 4  # of a weight that is not compressed
CHANNEL_BITS = f"{PREFIX}/channel_bits/"  # the prefix of the tags of bits


@dataclass(frozen=True)
class Series:
    """The values of one scalar over the steps of a run.

    Args:
        steps: Steps of the optimizer, rising.
        values: The value at each step.
    """

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, points: Mapping[int, float]) -> "Series":
        """Makes a series of values by their steps."""
        steps = sorted(points)
        return cls(tuple(steps), tuple(points[step] for step in steps))

    def at(self, step: int) -> float:
        """Returns the last value that was known at a step; the first value before all steps."""
        place = sum(s <= step for s in self.steps)
        return self.values[max(place - 1, 0)]


@dataclass(frozen=True)
class BitsFrame:
    """The bits of all channels at one step.

    Args:
        step: Steps of the optimizer so far.
        bits: Name of each weight -> the bits of its original channels, ``(channels,)``, NaN where removed.
    """

    step: int
    bits: Mapping[str, Tensor]


@dataclass(frozen=True)
class FloatLayer:
    """A quantized weight before compression.

    Args:
        channels: Number of output channels.
        weights: Number of weights.
        macs: Multiply-accumulates of one inference; 0 if not known.
    """

    channels: int
    weights: int
    macs: int = 0

    @classmethod
    def of(cls, parameter: QuantizedParameter) -> "FloatLayer":
        """Reads off a quantized weight what it was before."""
        spec = parameter.spec
        macs = round(spec.original_numel * (uses_of(parameter) or 0))
        return cls(spec.original_channels, spec.original_numel, macs)


@dataclass(frozen=True)
class LayerChange:
    """One compressed weight before and after. A value is None if the run did not record it.

    Args:
        name: Path of the weight's layer.
        channels_before: Number of output channels before compression.
        channels: Number of live output channels.
        weights_before: Number of weights before compression.
        weights: Number of weights in live channels.
        bits: Learned bits per original weight; per weight that is left, where the original number is not known.
        nbytes_before: Bytes of the weights in float.
        nbytes: Bytes of the codes and scales in the packed file.
        macs_before: Multiply-accumulates of one inference before compression.
        macs: Multiply-accumulates of one inference now.
    """

    name: str
    channels_before: int | None
    channels: int | None
    weights_before: int | None
    weights: int | None
    bits: float | None
    nbytes_before: int | None
    nbytes: int | None
    macs_before: int | None = None
    macs: int | None = None

    @classmethod
    def of(cls, size: LayerSize) -> "LayerChange":
        """Takes over the sizes of a weight from a size report."""
        known = size.macs_before > 0
        return cls(
            size.name,
            size.channels_before,
            size.channels,
            size.weights_before,
            size.weights,
            size.mean_bits,
            FLOAT_NBYTES * size.weights_before,
            size.code_nbytes + size.scale_nbytes,
            size.macs_before if known else None,
            size.macs if known else None,
        )


@dataclass(frozen=True)
class RunHistory:
    """What is known of one run.

    Args:
        name: The name of the run.
        scalars: Tag of each scalar -> its values.
        metric: Tag of the metric that is set against the bytes; empty if the run has none.
        mode: Whether a good metric is a large one, ``"max"``, or a small one, ``"min"``.
        frames: The bits over the steps.
        layers: The layers before and after.
        layers_of: The network whose layers these are, and what is not known of them; empty for the end of the run.
        before: Name of each quantized weight -> the weight before compression, where the run recorded it.
        other_nbytes: Part of the packed file besides codes and scales -> its bytes.
        float_nbytes: Bytes of the float network; None if not known.
        left_in_float: What was not compressed, and why.
        kept: The checkpoints that ParetoCheckpoint kept.
        command: The command that ran the training; empty if not known.
        notes: What the report lacks, and what to do about it.
    """

    name: str
    scalars: Mapping[str, Series] = field(default_factory=dict)
    metric: str = ""
    mode: Mode = "max"
    frames: tuple[BitsFrame, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    layers_of: str = ""
    before: Mapping[str, FloatLayer] = field(default_factory=dict)
    other_nbytes: Mapping[str, int] = field(default_factory=dict)
    float_nbytes: int | None = None
    left_in_float: tuple[tuple[str, str], ...] = ()
    kept: tuple[Point, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> Series:
        """The bytes of the packed file."""
        return self.scalars.get(NBYTES, Series())

    @property
    def points(self) -> tuple[Point, ...]:
        """The metric and the bytes of each validation; those of checkpoints that were kept have the file's name."""
        metric, nbytes = self.scalars.get(self.metric, Series()), self.nbytes
        if not nbytes.steps:
            return self.kept
        # a validation at the end of an epoch is logged one step before the removal that belongs to it
        seen = [Point(v, round(nbytes.at(s + 1)), s) for s, v in zip(metric.steps, metric.values, strict=True)]
        files = {step for point in self.kept for step in (point.step, point.step - 1)}
        return (*(point for point in seen if point.step not in files), *self.kept)

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in both metric and bytes."""
        return front(self.points, self.mode)


def guess_metric(tags: Sequence[str]) -> str:
    """Returns the scalar that most likely tells how good a network is: an accuracy or a score, of validation first.

    >>> from lightning_selfcompress.reporting.history import guess_metric
    >>> guess_metric(["train_loss", "val_loss", "val/accuracy", "selfcompress/nbytes"])
    'val/accuracy'

    Args:
        tags: The tags of a run's scalars.

    Returns:
        The tag; empty if there is none that could be a metric.
    """
    words = ("acc", "f1", "auc", "iou", "dice", "psnr", "map", "score", "loss", "error", "mse")
    own = [tag for tag in tags if not tag.startswith(PREFIX) and not tag.startswith(("hp_metric", "epoch"))]
    ranked = [
        (not any(word in tag.lower() for word in ("val", "valid", "test")), rank, tag)
        for tag in own
        for rank, word in enumerate(words)
        if word in tag.lower().replace("_step", "")
    ]
    return min(ranked)[2] if ranked else ""


def guess_mode(metric: str) -> Mode:
    """Returns whether a metric of this name is good when it is small, such as a loss or an error, or large."""
    small = ("loss", "error", "err", "mse", "mae", "perplexity", "ppl", "wer", "objective")
    return "min" if any(word in metric.lower() for word in small) else "max"


def sizes_of(report: SizeReport) -> dict[str, Any]:
    """Returns the fields of a :class:`RunHistory` that a size report fills.

    Args:
        report: The sizes of the network at the end of the run.
    """
    return {
        "layers": tuple(map(LayerChange.of, report.layers)),
        "other_nbytes": {
            "biases": report.bias_nbytes,
            "everything left in float": report.other_nbytes,
            "names and shapes": report.structure_nbytes,
        },
        "float_nbytes": report.float_nbytes,
    }


def thinned(frames: Sequence[BitsFrame], most: int) -> tuple[BitsFrame, ...]:
    """Returns at most so many of the frames, evenly spread, the first and the last among them.

    Args:
        frames: The frames of a run.
        most: The largest number of frames to return, at least 2.
    """
    if len(frames) <= most:
        return tuple(frames)
    places = torch.linspace(0, len(frames) - 1, most).round().long().tolist()
    return tuple(frames[i] for i in places)
