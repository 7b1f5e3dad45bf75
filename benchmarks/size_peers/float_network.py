"""The float network, in float32 and float16."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from size_peers.codes import squeeze, unsqueeze
from size_peers.method import Setting, folded
from size_peers.task import Task
from size_peers.training import Run, trained_float


class FloatNetwork:
    """All values one after the other, batch normalization folded, by the best of general compressors."""

    name = "float"
    needs: Sequence[str] = ()
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        return [{"dtype": "float32"}, {"dtype": "float16"}]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        return trained_float(run)

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        state = folded(trained, run.task).state_dict()
        path.write_bytes(squeeze(b"".join(t.numpy().astype(setting["dtype"]).tobytes() for t in state.values())))

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        net = folded(task.network(), task)
        values = np.frombuffer(unsqueeze(path.read_bytes()), setting["dtype"]).astype(np.float32)
        torch.nn.utils.vector_to_parameters(torch.from_numpy(values), net.parameters())
        return net
