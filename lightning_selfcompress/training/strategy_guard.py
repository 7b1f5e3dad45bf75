"""What a Trainer's strategy does to checkpoints: marked as they are written, named and whole as they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from lightning_selfcompress.files.checkpoint import FORMAT, MARK, check_readable, misfit
from lightning_selfcompress.quantize.convert import revert_layer
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_layers
from lightning_selfcompress.removal.surgery import Replacement, changed_sizes, replace_tensors, take_sizes
from lightning_selfcompress.tensors import stored_tensors
from lightning_selfcompress.training.strategies import keep_depths_from_ddp


def guard_strategy(strategy: Any) -> None:
    """Has a Trainer's strategy mark the checkpoints it writes, name files it cannot read, and load all or nothing.

    Args:
        strategy: A Lightning strategy. Nothing is done to it twice.
    """
    if "load_checkpoint" in strategy.__dict__:
        return
    save, load, fill = strategy.save_checkpoint, strategy.load_checkpoint, strategy.load_model_state_dict

    @wraps(save)
    def marked(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(m, Quantized) for m in strategy.lightning_module.modules()):
            mark = {MARK: torch.tensor(FORMAT)}  # first, so that it is the first key in an error
            sizes = changed_sizes(strategy.lightning_module)
            mark |= {f"{MARK}.{name}": torch.tensor(value) for name, value in sizes.items()}
            checkpoint = {**checkpoint, "state_dict": {**mark, **checkpoint["state_dict"]}}
        return save(checkpoint, *args, **kwargs)

    @wraps(load)
    def named(path: Any, *args: Any, **kwargs: Any) -> Any:
        return check_readable(lambda: load(path, *args, **kwargs), path)

    @wraps(fill)
    def whole(*args: Any, **kwargs: Any) -> Any:
        with _all_or_nothing(strategy.lightning_module):
            filled = fill(*args, **kwargs)
        keep_depths_from_ddp(strategy, strategy.lightning_module)  # of layers that were converted as they were loaded
        return filled

    strategy.save_checkpoint, strategy.load_checkpoint, strategy.load_model_state_dict = marked, named, whole


@contextmanager
def _all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Leaves a module as it was, shapes and classes included, where loading raises; the error also says what to do."""
    converted = set(quantized_layers(module))
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(module).items()}
    sizes = changed_sizes(module)
    try:
        yield
    except Exception as error:
        for layer in [layer for layer in quantized_layers(module) if layer not in converted]:
            revert_layer(layer)
        now = stored_tensors(module)
        reshaped = {name for name, values in before.items() if now[name].shape != values.shape}
        replace_tensors(module, {id(now[name]): Replacement(before[name].clone()) for name in reshaped})
        take_sizes(module, sizes)
        with torch.no_grad():
            for name, tensor in stored_tensors(module).items():
                tensor.copy_(before[name])
        if isinstance(error, RuntimeError):
            raise misfit(error, type(module)) from error
        raise
