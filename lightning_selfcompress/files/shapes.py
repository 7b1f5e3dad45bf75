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


def _dims_that_stay(module: nn.Module, name: str) -> range:
    """Returns the dimensions of a module's tensor that no removal makes smaller.

    These are the kernel sizes of convolutions, the tokens of embeddings, the dimensions that LayerNorm and RMSNorm
    normalize, and the outputs of the input projection of attention layers.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return range(2, 5)
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
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _states_agree(module, shapes)
    return True


def _states_agree(layer: nn.RNNBase | nn.RNNCellBase, shapes: Mapping[str, Shape]) -> bool:
    """Returns whether the tensors of a recurrent layer have one size of the state, in all of its layers and gates."""
    first = "_l0" if isinstance(layer, nn.RNNBase) else ""
    rows, returned = shapes[f"weight_hh{first}"]
    hidden = shapes.get(f"weight_hr{first}", (returned, returned))[1]
    latent = layer._parameters[f"weight_hh{first}"]
    gates = latent.shape[0] // layer.hidden_size if latent is not None else 1
    below = returned * (2 if getattr(layer, "bidirectional", False) else 1)  # what a layer above the first one reads
    wanted = {
        "weight_hh": (gates * hidden, returned),
        "weight_hr": (returned, hidden),
        "bias_ih": (gates * hidden,),
        "bias_hh": (gates * hidden,),
    }
    for name, shape in shapes.items():
        kind = name.partition("_l")[0]
        if kind == "weight_ih" and name in layer._parameters:
            read = below if first and "_l0" not in name else shapes[f"weight_ih{first}"][1]
            if shape != (gates * hidden, read):
                return False
        elif name in layer._parameters and shape != wanted.get(kind, shape):
            return False
    return rows > 0 and returned > 0


def wrong_shape(name: str, tensor: Tensor, found: Shape, what: str) -> str:
    """Returns the message about a shape that does not fit a tensor."""
    return (
        f"Expected {what} {tuple(tensor.shape)} for {name!r}, got {tuple(found)}. It was saved from another "
        f"network, or from this one with other arguments."
    )
