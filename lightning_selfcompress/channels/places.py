"""The places in a network at which operations run, for reasons that name the module."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_selfcompress.channels.call import NEEDS_ALL
from lightning_selfcompress.channels.channels import Slot
from lightning_selfcompress.quantize.layers import Quantized

_NAMES = {"native_layer_norm": "layer_norm", "native_batch_norm": "batch_norm", "native_group_norm": "group_norm"}


def in_streams(pinned: Mapping[int, str], group: NDArray[np.int64], slots: Iterable[Slot]) -> dict[int, str]:
    """Returns the reasons of pinned channels, with the word for channels to which several layers add.

    Args:
        pinned: The pinned channels, each with the reason.
        group: The channel of each atom.
        slots: The dimensions of all tensors.
    """
    layers = Counter(n for slot in slots if slot.produces for n in np.unique(group[slot.atoms]).tolist())
    one, several = NEEDS_ALL, NEEDS_ALL.replace("its input", "the residual stream")
    return {n: why.replace(one, several) if layers[n] > 1 else why for n, why in pinned.items()}


class Places:
    """Knows the module that is running, by hooks on all modules of a model."""

    def __init__(self) -> None:
        self._running: list[tuple[str, nn.Module]] = []

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[None]:
        """Follows the modules of a model within this context."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                stack.callback(module.register_forward_pre_hook(self._enter(path)).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            try:
                yield
            finally:
                self._running.clear()

    def of(self, operation: str) -> str:
        """Returns the name of an operation with its place: ``"LayerNorm at encoder.norm"``, ``"add in Block at 1"``.

        An operation in the model's own code has no other place.
        """
        name = _NAMES.get(operation, operation.strip("_"))
        name = "scaled_dot_product_attention" if name.startswith("scaled_dot_product") else name  # of any kernel
        if not self._running or not self._running[-1][0]:
            return name
        path, module = self._running[-1]
        kind = (module._float_class if isinstance(module, Quantized) else type(module)).__name__
        is_layer = type(module).__module__.startswith("torch.nn") or isinstance(module, Quantized)
        if is_layer and not any(True for _ in module.children()):
            return f"{kind} at {path}"
        return f"{name} in {kind} at {path}"

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, _args: Any) -> None:
            self._running.append((path, module))

        return enter

    def _leave(self, module: nn.Module, _args: Any, _out: Any) -> None:
        while self._running and self._running.pop()[1] is not module:
            continue  # modules in which an exception was raised
