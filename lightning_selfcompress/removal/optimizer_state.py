"""The removal of channels from the parameters and the state of optimizers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_selfcompress.removal.surgery import Shrunk, shrink
from lightning_selfcompress.tensors import map_tensors


def shrink_optimizer(optimizer: Optimizer, shrunk: Iterable[Shrunk]) -> None:
    """Removes entries from the state of an optimizer in place, to match parameters that have become smaller.

    The state of the kept entries is kept. Each tensor of a parameter's state that has as many dimensions as the
    parameter is sliced along those dimensions where it has the parameter's old size. A parameter that was replaced by a
    new object is replaced in the parameter groups, whose lists stay the same objects.

    For optimizers that treat every entry on its own, and LBFGS where the removed entries never moved, the next steps
    equal the steps of the larger network with the removed channels held at zero. Computations that depend on a tensor's
    shape use the new shape: Adafactor's root mean squares of weights and updates, Muon's ``adjust_lr_fn``.

    Args:
        optimizer: Any optimizer of torch, or an optimizer that keeps its state in the same way.
        shrunk: The tensors that have become smaller; tensors that the optimizer does not hold are ignored.
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
    """Slices the state of one parameter, one tensor at a time, so that memory holds only one tensor twice."""

    def smaller(tensor: Tensor) -> Tensor:
        if tensor.dim() != len(record.shape):
            return tensor
        kept = {dim: indices for dim, indices in record.kept.items() if tensor.shape[dim] == record.shape[dim]}
        tensor = shrink(tensor, kept)
        if tensor.shape == record.new.shape and tensor.stride() != record.new.stride():
            # fused kernels read parameter and state in the order of memory and ignore the strides
            tensor = torch.empty_like(record.new, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return tensor

    if factored and "row_var" in state:
        _rescale_factors(state, record)
    for name, value in state.items():
        state[name] = map_tensors(smaller, value)


def _rescale_factors(state: dict[str, Any], record: Shrunk) -> None:
    """Rescales Adafactor's means over rows and columns to means over the kept entries, before they are sliced.

    Adafactor's estimate of the squared gradient is V = R C / mean(R), R being the means over the last dimension and C
    the means over the one before it (Shazeer and Stern 2018, arXiv:1804.04235). V is unchanged for every kept entry if
    R is multiplied by the old number of columns over the new number, and C by the mean of the kept R over the mean of
    all R. The later steps are exact too where the gradients of the removed rows had been 0.
    """
    row_var, rows = state["row_var"], len(record.shape) - 2
    kept_rows = {dim: indices for dim, indices in record.kept.items() if dim == rows}
    mean, kept_mean = (r.mean(-2, keepdim=True) for r in (row_var, shrink(row_var, kept_rows)))
    state["row_var"] = row_var * (record.shape[-1] / record.new.shape[-1])
    state["col_var"] = state["col_var"] * torch.where(mean > 0, kept_mean / mean, torch.ones_like(mean))


def _shrink_lbfgs(optimizer: torch.optim.LBFGS, parameters: Sequence[Tensor], records: Mapping[int, Shrunk]) -> None:
    """Slices the vectors over all parameters in the state of LBFGS, under all keys."""
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
