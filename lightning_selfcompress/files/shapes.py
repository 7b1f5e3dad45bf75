"""Checks of whether the shapes in a file can be the shapes of a module after its removals."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.tensors import NORMS, name_of, own_tensors

Shape = tuple[int, ...]


def check_sizes(module: nn.Module, shapes: Mapping[str, Shape], *, larger: bool = False) -> None:
    """Checks that shapes can be the shapes of a module's parameters and buffers, before or after removals.

    Args:
        module: The module.
        shapes: Name of a parameter or buffer -> its shape in the file.
        larger: Whether the shapes may be larger than the module's shapes, because the module itself has shrunk.

    Raises:
        CheckpointError: If the shapes belong to another network.
    """
    tied = {  # a tied tensor may be stored once, under one of its names
        id(tensor): shapes[name_of(path, name)]
        for path, m in module.named_modules()
        for name, tensor in own_tensors(m)
        if name_of(path, name) in shapes
    }
    for path, m in module.named_modules():
        for name, tensor in own_tensors(m):
            found = tied.get(id(tensor))
            if found is None or found == tensor.shape:
                continue
            same_rank = len(found) == tensor.dim()
            kept = _dims_that_stay(m, name)
            if not same_rank or any(found[d] != tensor.shape[d] for d in range(tensor.dim()) if d in kept):
                raise CheckpointError(wrong_shape(name_of(path, name), tensor, found, "the dimensions of"))
            if not larger and any(a > b for a, b in zip(found, tensor.shape, strict=True)):
                raise CheckpointError(wrong_shape(name_of(path, name), tensor, found, "at most"))
        own = {name: tuple(tensor.shape) for name, tensor in own_tensors(m)}
        there = {name: tied.get(id(tensor), tuple(tensor.shape)) for name, tensor in own_tensors(m)}
        if _fit_together(m, own) and not _fit_together(m, there):
            raise CheckpointError(
                f"Expected tensors of {path or 'the network'!r}, a {type(m).__name__}, that fit one another, got "
                f"{', '.join(f'{name} {shape}' for name, shape in there.items())}. Take another copy of the file."
            )


_FIXED = (nn.RNNBase, nn.RNNCellBase)  # layers whose sizes stay fixed, except for the input size


def _dims_that_stay(module: nn.Module, name: str) -> range:
    """Returns the dimensions of a module's tensor that no removal makes smaller.

    These are the kernel sizes of convolutions, the tokens of embeddings, the dimensions that LayerNorm and RMSNorm
    normalize, the states of recurrent layers, and the outputs of the input projection of attention layers.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return range(2, 5)
    if isinstance(module, _FIXED):
        return range(1) if name in ("weight_ih_l0", "weight_ih_l0_reverse", "weight_ih") else range(2)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return range(len(module.normalized_shape))
    if isinstance(module, nn.MultiheadAttention) and name in ("in_proj_weight", "in_proj_bias"):
        return range(1)
    return range(1) if isinstance(module, nn.Embedding | nn.EmbeddingBag) and name == "weight" else range(0)


def _fit_together(module: nn.Module, shapes: Mapping[str, Shape]) -> bool:
    """Returns whether a module's tensors agree on the number of channels, which torch does not always check."""
    weight, bias = shapes.get("weight"), shapes.get("bias")
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and weight and bias:
        return bias[0] % weight[1] == 0 if weight[1] else bias[0] == 0
    if isinstance(module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd) and weight and bias:
        return bias == weight[:1]
    if isinstance(module, NORMS):
        group = module.num_channels // module.num_groups if isinstance(module, nn.GroupNorm) else 1
        counts = {shape for shape in shapes.values() if shape}
        return len(counts) < 2 and all(n % group == 0 and (n or group == 1) for n, *_ in counts)
    return True


def wrong_shape(name: str, tensor: Tensor, found: Shape, what: str) -> str:
    """Returns the message about a shape that does not fit a tensor."""
    return (
        f"Expected {what} {tuple(tensor.shape)} for {name!r}, got {tuple(found)}. It was saved from another "
        f"network, or from this one with other arguments."
    )
