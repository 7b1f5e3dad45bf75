"""The running statistics of batch normalization, estimated anew for the weights as they are now.

Batch normalization averages the statistics of its last ten or twenty training batches. While codes of few bits still
move, each of these batches saw another network, and the average is the statistics of none of them: a network can
classify at chance in evaluation mode that is right in nearly all cases with statistics of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.tensors import map_tensors

_DROPOUT = nn.modules.dropout._DropoutNd


def with_statistics(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Returns the normalization layers of a model that keep running statistics, by their paths."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {n: m for n, m in layers.items() if m.running_mean is not None and m.num_batches_tracked is not None}


@contextmanager
def reestimating(model: nn.Module, paths: Iterable[str] | None = None) -> Iterator[None]:
    """Averages the statistics of all forward passes within this context, and leaves everything else as it was.

    Within the context the model is in training mode, without dropout. Where a layer was not run, or an error ended the
    context, its statistics stay as they were.

    Args:
        model: A model.
        paths: Paths of the normalization layers to estimate; None for all. The others normalize as in evaluation.
    """
    known = with_statistics(model)
    layers = {name: known[name] for name in (known if paths is None else paths)}
    modes = {module: module.training for module in model.modules()}
    momenta = {name: m.momentum for name, m in layers.items()}
    before = {name: [t.clone() for t in _statistics(m)] for name, m in layers.items()}
    done = False
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, _DROPOUT) or (name in known and name not in layers):
            module.train(False)
    for m in layers.values():
        m.reset_running_stats()
        m.momentum = None  # a plain average over batches
    try:
        yield
        done = True
    finally:
        for name, m in layers.items():
            ran = bool(_statistics(m)[2])
            m.momentum = momenta[name]
            with torch.no_grad():
                for tensor, value in zip(_statistics(m), before[name], strict=True):
                    if not done or not ran or tensor is m.num_batches_tracked:
                        tensor.copy_(value)
        for module, mode in modes.items():
            module.training = mode


def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


@torch.no_grad()
def recalibrate(
    model: nn.Module, loader: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Estimates the running statistics of batch normalization anew, on batches of training data.

    Training with ``SelfCompression`` does this itself before each validation and at the end of each epoch. Call the
    function after changing weights by hand, or before evaluating a checkpoint from the middle of an epoch. Nothing but
    the statistics changes.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import recalibrate
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> recalibrate(net, [torch.randn(32, 4) for _ in range(5)])
    5

    Args:
        model: Any model, converted or not.
        loader: Batches of training data; some dozens are enough.
        forward: Runs the model on a batch, ``forward(model, batch)``. By default the model is called with the batch if
            it is a tensor, otherwise with its first entry.

    Returns:
        The number of batches that were run; 0 if the model keeps no such statistics.

    Raises:
        TypeError: If a batch is neither a tensor nor a list or tuple, and ``forward`` is not given.
        ValueError: If the loader has no batches.
    """
    if not with_statistics(model):
        return 0
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    count = 0
    with reestimating(model):
        for batch in loader:
            moved = map_tensors(lambda tensor: tensor.to(device), batch)
            (forward or _forward)(model, moved)
            count += 1
        if not count:
            raise ValueError("Expected a loader with batches, got none.")
    return count


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping) or not isinstance(batch, Tensor | list | tuple):
        raise TypeError(
            f"Expected batches that are tensors, or lists or tuples whose first entry is one, got "
            f"{type(batch).__name__}. Say how the model is run on a batch: recalibrate(model, loader, "
            f"forward=lambda model, batch: model(batch['x']))."
        )
    return model(batch if isinstance(batch, Tensor) else batch[0])
