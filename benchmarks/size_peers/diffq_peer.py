"""DiffQ (Défossez et al. 2021, arXiv 2104.09987): pseudo quantization noise, learned bits for groups of weights.

DiffQ's licence is CC-BY-NC 4.0: it is installed and called, nothing here is taken from it.
"""

import pickle
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from size_peers.codes import squeeze, unsqueeze
from size_peers.method import Setting, empty, normalization_as_scale_and_shift
from size_peers.task import Task
from size_peers.training import Run, train


def mapped(state: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same containers with ``leaf`` of everything that is no container."""
    if isinstance(state, dict):
        return {key: mapped(value, leaf) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(mapped(value, leaf) for value in state)
    return leaf(state)


def narrow(value: Any) -> Any:
    """A tensor as dtype, shape and bytes, integers in a byte where they fit: less than torch writes for it."""
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().numpy()
    small = array.dtype.kind in "iu" and array.size > 0 and array.min() >= 0 and array.max() < 256
    return _Stored((array.dtype.str, array.shape, small, (array.astype(np.uint8) if small else array).tobytes()))


def widen(value: Any) -> Any:
    """The inverse of :func:`narrow`."""
    if not isinstance(value, _Stored):
        return value
    dtype, shape, small, content = value.content
    return torch.from_numpy(np.frombuffer(content, np.uint8 if small else dtype).astype(dtype).reshape(shape))


class _Stored:
    """A tensor in the pickled state."""

    def __init__(self, content: tuple[str, tuple[int, ...], bool, bytes]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return _Stored, (self.content,)


class DiffQ:
    """DiffQ's own quantizer in training, and its own compressed state in the file, by the best of compressors."""

    name = "diffq"
    needs: Sequence[str] = ("diffq==0.2.4",)
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        # Loss per MB of the network: 1.7 MB of LeNet-5 and 1.1 MB of ResNet-20 in float.
        return [{"penalty": penalty, "group_size": 4} for penalty in (0.1, 1.0, 5.0, 20.0)]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        net = run.network()
        made: list[Any] = []

        def prepare(optimizer: torch.optim.Optimizer) -> None:
            made.append(quantizer(net, setting["group_size"]))
            made[0].setup_optimizer(optimizer)

        name = f"diffq-penalty{setting['penalty']}-group{setting['group_size']}"
        _, seconds = train(
            run, name, net, prepare=prepare, extra_loss=lambda: setting["penalty"] * made[0].model_size()
        )
        return made[0], seconds

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        normalization_as_scale_and_shift(trained.model)
        states = [trained.get_quantized_state(packed=packed) for packed in (False, True)]
        path.write_bytes(min((squeeze(pickle.dumps(mapped(state, narrow))) for state in states), key=len))

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        net = empty(task)
        state = mapped(pickle.loads(unsqueeze(path.read_bytes())), widen)
        import_module("diffq").restore_quantized_state(net, state)
        return net.eval()


def quantizer(net: nn.Module, group_size: int) -> Any:
    """DiffQ's quantizer; tensors of at most 524 values stay in float16."""
    return import_module("diffq").DiffQuantizer(net, min_size=0.002, float16=True, group_size=group_size)
