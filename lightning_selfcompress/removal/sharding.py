"""The removal from parameters that FSDP2 shards: gathered one at a time, sliced, and sharded again in place.

Every private name of ``torch.distributed.fsdp`` that this package uses is in this file.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_selfcompress.tensors import is_a, is_sharded, stored_tensors


def settle_shards(model: nn.Module) -> None:
    """Has every module that ``fully_shard`` took hold shards only, as before a forward pass.

    A root module keeps its whole parameters after a forward pass that no backward pass followed, such as a validation.

    Args:
        model: Any module; one that is not sharded is left alone.

    Raises:
        RuntimeError: If gradients of a whole parameter wait for a later batch to be reduced.
    """
    for group in _groups(model):
        for sharded in group.fsdp_params:
            unreduced = getattr(getattr(sharded, "_unsharded_param", None), "grad", None)
            if unreduced is not None or sharded.unsharded_accumulated_grad is not None:
                raise RuntimeError(
                    f"Expected the gradients of all parameters to be reduced before a removal, got gradients of "
                    f"{sharded._param_fqn or sharded._module_info.param_name!r} that were accumulated without it. "
                    f"Remove after a step of the optimizer."
                )
    for module in model.modules():
        if is_a(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def check_shards(model: nn.Module) -> None:
    """Checks that every sharded parameter belongs to ``fully_shard``, so that it can be sharded again.

    Args:
        model: Any module.

    Raises:
        ValueError: If a parameter was sharded otherwise, by tensor parallelism for example.
    """
    known = {id(sharded.sharded_param) for group in _groups(model) for sharded in group.fsdp_params}
    for name, tensor in stored_tensors(model).items():
        if is_sharded(tensor) and id(tensor) not in known:
            raise ValueError(
                f"Expected {name!r} to be sharded by fully_shard, got a DTensor that no module of FSDP2 holds. Shard "
                f"it with fully_shard, which takes dimension 0, and leave tensor parallelism out."
            )


def shard_again(
    model: nn.Module,
    tensor: Tensor,  # a sharded parameter
    data: Tensor,  # the whole of its new entries
    gradient: Tensor | None,  # of the shape of ``data``
) -> Tensor:
    """Gives a sharded parameter new entries, of which each process keeps its part.

    Nothing is communicated: every process has the whole.

    Args:
        model: The module with the parameter.
        tensor: The parameter as the model has it.
        data: The new entries, alike in all processes.
        gradient: Their gradient, or None.

    Returns:
        The same object; a new one where something holds a weak reference or a graph of the old one.
    """
    group, index = next(
        (group, index)
        for group in _groups(model)
        for index, sharded in enumerate(group.fsdp_params)
        if sharded.sharded_param is tensor
    )
    before = group.fsdp_params[index]
    whole = nn.Parameter(data.contiguous(), requires_grad=tensor.requires_grad)
    attributes = dict(tensor.__dict__)
    tensor.grad = None
    after = type(before)(
        whole,
        before._module_info,
        before.mesh_info,
        before.post_forward_mesh_info,
        before.device,
        lambda _: before.fsdp_placement,
        before.mp_policy,
        group.offload_policy,
    )
    before._post_load_hook_handle.remove()
    after._param_fqn = before._param_fqn
    after.init_dtype_attrs(before.mp_policy)
    group.fsdp_params[index] = after
    now = _in_place_of(tensor, after)
    now.__dict__.update(attributes)
    if gradient is not None:
        now.grad = shard_like(gradient, now)
    return now


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor as another one is sharded, without communication.

    Args:
        tensor: The whole, alike in all processes.
        like: A sharded tensor, on the device of the whole.
    """
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def _in_place_of(tensor: Tensor, sharded: Any) -> Tensor:
    """Has the old object of a parameter hold the new shard, so that optimizers and lists keep it."""
    new = sharded.sharded_param
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError:  # a weak reference or a graph holds the old tensor
        return new  # type: ignore[no-any-return]
    sharded.sharded_param = tensor
    sharded._setattr_on_modules(tensor)
    return tensor


def _groups(model: nn.Module) -> Iterator[Any]:
    """Yields the groups of parameters that FSDP2 gathers together."""
    for module in model.modules():
        if is_a(module, "FSDPModule"):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from [state._fsdp_param_group] if groups is None else groups  # before torch 2.11 there is one
