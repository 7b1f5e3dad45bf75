"""Optimizers that go on with parameters from which channels were removed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_selfcompress.removal.surgery import Shrunk, shrink
from lightning_selfcompress.tensors import map_tensors


def shrink_optimizer(optimizer: Optimizer, shrunk: Iterable[Shrunk]) -> None:
    """Makes an optimizer go on with parameters that have become smaller, in place.

    What the optimizer remembers of the kept entries stays: each tensor of a parameter's state that has as many
    dimensions as the parameter is sliced along those dimensions where it has the parameter's old size. A parameter that
    was replaced by a new object is replaced in the groups, whose lists stay the same objects.

    For optimizers that treat every entry on its own, and LBFGS where the removed entries never moved, the next steps
    equal the steps of the larger network with the removed channels held at zero. Whatever depends on a tensor's shape
    follows the new shape: Adafactor's root mean squares of weights and updates, Muon's ``adjust_lr_fn``.

    Args:
        optimizer: Any optimizer of torch, or one that keeps its state as those do.
        shrunk: What has become smaller; tensors that the optimizer does not hold are passed over.
    """
    records = {id(record.old): record for record in shrunk}
    before = [p for group in optimizer.param_groups for p in group["params"]]
    if all(id(p) not in records for p in before):
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        _shrink_lbfgs(optimizer, before, records)
    else:
        for p, state in optimizer.state.items():
            if id(p) in records:
                _shrink_state(state, records[id(p)], factored=isinstance(optimizer, torch.optim.Adafactor))
    for group in optimizer.param_groups:
        group["params"][:] = [records[id(p)].new if id(p) in records else p for p in group["params"]]
    states = [(records[id(p)].new if id(p) in records else p, state) for p, state in optimizer.state.items()]
    optimizer.state.clear()
    optimizer.state.update(states)


def _shrink_state(state: dict[str, Any], record: Shrunk, *, factored: bool) -> None:
    """Slices what is remembered of one parameter, a tensor at a time so that only one is there twice."""

    def smaller(tensor: Tensor) -> Tensor:
        if tensor.dim() != len(record.shape):
            return tensor
        kept = {dim: indices for dim, indices in record.kept.items() if tensor.shape[dim] == record.shape[dim]}
        tensor = shrink(tensor, kept)
        if tensor.shape == record.new.shape and tensor.stride() != record.new.stride():
            # fused kernels walk through parameter and state in the order of memory, whatever their strides
            tensor = torch.empty_like(record.new, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return tensor

    if factored and "row_var" in state:
        _rescale_factors(state, record)
    for name, value in state.items():
        state[name] = map_tensors(smaller, value)


def _rescale_factors(state: dict[str, Any], record: Shrunk) -> None:
    """Makes Adafactor's means over rows and columns, before they are sliced, means over the kept entries.

    Adafactor's estimate of the squared gradient is V = R C / mean(R), R being the means over the last dimension and C
    the means over the one before it (Shazeer and Stern 2018, arXiv:1804.04235). V is unchanged for every kept entry if
    R is multiplied by the old number of columns over the new one, and C by the mean of kept R over the mean of all R.
    The steps after that are exact too where the gradients of the removed rows had been 0.
    """
    row_var, rows = state["row_var"], len(record.shape) - 2
    kept_rows = {dim: indices for dim, indices in record.kept.items() if dim == rows}
    mean, kept_mean = (r.mean(-2, keepdim=True) for r in (row_var, shrink(row_var, kept_rows)))
    state["row_var"] = row_var * (record.shape[-1] / record.new.shape[-1])
    state["col_var"] = state["col_var"] * torch.where(mean > 0, kept_mean / mean, torch.ones_like(mean))


def _shrink_lbfgs(optimizer: torch.optim.LBFGS, parameters: Sequence[Tensor], records: Mapping[int, Shrunk]) -> None:
    """Slices LBFGS's vectors, each of which runs through all parameters, under whichever key they are kept."""
    before = [records[id(p)].shape if id(p) in records else tuple(p.shape) for p in parameters]
    shapes = [(*shape, 2) if p.is_complex() else shape for p, shape in zip(parameters, before, strict=True)]
    numels = [math.prod(shape) for shape in shapes]
    positions = torch.cat(
        [
            shrink(flat.view(shape), records[id(p)].kept if id(p) in records else {}).flatten()
            for p, shape, flat in zip(parameters, shapes, torch.arange(sum(numels)).split(numels), strict=True)
        ]
    )

    def smaller(tensor: Tensor) -> Tensor:
        return shrink(tensor, {0: positions}) if tensor.shape == (sum(numels),) else tensor

    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = map_tensors(smaller, value)
    optimizer._numel_cache = None
