"""What a callback records of a run while it trains, and finds again in a checkpoint."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_selfcompress.reporting.history import BitsFrame, FloatLayer, Series

MOST_POINTS = 2000  # of one scalar; the next one has every second left out
MOST_FRAMES = 120  # of the bits


@dataclass
class Recording:
    """The record of one run while it goes on.

    Args:
        metric: Tag of the metric that is set against the bytes.
        command: The command that runs the training.
        points: Tag of each scalar -> its value at each step.
        frames: The bits over the steps.
        before: Name of each quantized weight -> the weight before compression.
        float_nbytes: Bytes of the float network.
        left_in_float: What is not compressed, and why.
    """

    metric: str = ""
    command: str = ""
    points: dict[str, dict[int, float]] = field(default_factory=dict)
    frames: tuple[BitsFrame, ...] = ()
    before: dict[str, FloatLayer] = field(default_factory=dict)
    float_nbytes: int | None = None
    left_in_float: tuple[tuple[str, str], ...] = ()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars at a step."""
        for tag, value in values.items():
            series = self.points.setdefault(tag, {})
            series[step] = value
            if len(series) > MOST_POINTS:
                steps = sorted(series)
                self.points[tag] = {s: series[s] for s in (*steps[:-1:2], steps[-1])}

    def add_frame(self, step: int, bits: Mapping[str, Tensor]) -> None:
        """Records the bits of all channels at a step, rounded as :meth:`state_dict` keeps them."""
        frames = [frame for frame in self.frames if frame.step < step]
        if len(frames) >= MOST_FRAMES:
            frames = [*frames[:-1:2], frames[-1]]
        self.frames = (*frames, BitsFrame(step, {name: values.half().float() for name, values in bits.items()}))

    @property
    def scalars(self) -> dict[str, Series]:
        """The scalars as they are reported."""
        return {tag: Series.of(points) for tag, points in self.points.items()}

    def state_dict(self) -> dict[str, Any]:
        """The record in plain values and tensors; bits of channels take two bytes each."""
        return {
            "metric": self.metric,
            "command": self.command,
            "points": {tag: dict(points) for tag, points in self.points.items()},
            "frames": [(f.step, {name: bits.half() for name, bits in f.bits.items()}) for f in self.frames],
            "before": {name: [w.channels, w.weights, w.macs] for name, w in self.before.items()},
            "float_nbytes": self.float_nbytes,
            "left_in_float": [list(pair) for pair in self.left_in_float],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Recording":
        """Makes the record that :meth:`state_dict` returned."""
        return cls(
            metric=state["metric"],
            command=state["command"],
            points={tag: dict(points) for tag, points in state["points"].items()},
            frames=tuple(BitsFrame(step, {n: b.float() for n, b in bits.items()}) for step, bits in state["frames"]),
            before={name: FloatLayer(*numbers) for name, numbers in state["before"].items()},
            float_nbytes=state["float_nbytes"],
            left_in_float=tuple((what, why) for what, why in state["left_in_float"]),
        )


def command_of(arguments: Sequence[str] | None = None) -> str:
    """Returns the command that started this process, as a shell takes it; empty within a notebook.

    >>> from lightning_selfcompress.reporting.recording import command_of
    >>> command_of(["train.py", "fit", "--name", "two words"])
    "python train.py fit --name 'two words'"

    Args:
        arguments: The script and its arguments; None takes those of the process.
    """
    program, *rest = sys.argv if arguments is None else arguments
    if not program or Path(program).name == "ipykernel_launcher.py":
        return ""
    return shlex.join((["python", program] if program.endswith(".py") else [program]) + rest)
