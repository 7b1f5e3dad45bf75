"""NNCodec (Becking et al. 2023), the coder of ISO/IEC 15938-17: DeepCABAC and dependent quantization."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn

from size_peers.codes import filled
from size_peers.method import Setting, folded
from size_peers.task import Task
from size_peers.training import Run, trained_float


def nncodec() -> Any:
    """NNCodec's coder. Its import asks for torchvision, which only its examples need: a stand-in will do."""
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):  # a build for another torch raises a RuntimeError
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        module: Any = ModuleType("torchvision")
        module.datasets = module.transforms = MagicMock()
        sys.modules["torchvision"] = module
        try:
            return import_module("nncodec.nnc")
        finally:
            del sys.modules["torchvision"]
    return import_module("nncodec.nnc")


class NNCodec:
    """NNCodec's bitstream of the float network, batch normalization folded. Tensors are named by numbers."""

    name = "nncodec"
    needs: Sequence[str] = ("nncodec==2.1.3",)
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        return [{"qp": qp} for qp in (-38, -32, -26, -22, -20, -18)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        return trained_float(run)[0], 0.0

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        state = folded(trained, run.task).state_dict().values()
        content = {str(i): value.numpy().astype(np.float32) for i, value in enumerate(state)}
        compress = nncodec().compress
        stream = compress(
            content,
            bitstream_path=str(path),
            qp=setting["qp"],
            nonweight_qp=-38,
            row_skipping=True,
            return_bitstream=True,
        )  # biases at qp -38: NNCodec's own -75 takes more bytes for them than float16
        path.write_bytes(stream)

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        net = folded(task.network(), task)
        found = nncodec().decompress(bytearray(path.read_bytes()))
        names = list(net.state_dict())
        return filled(net, {name: torch.from_numpy(np.array(found[str(i)])) for i, name in enumerate(names)})
