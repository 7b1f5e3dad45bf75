"""The layer types that can be quantized, with the names and output-channel axes of their weights."""

from collections.abc import Callable
from typing import cast

from torch import nn

from lightning_selfcompress.quantize.layers import ChannelAxis


def _rows(*names: str) -> Callable[[nn.Module], dict[str, ChannelAxis]]:
    # The layer does not use a weight that is registered as None. A hook has removed a weight that is not registered:
    # the weight is listed here, and the plan reports it as an obstacle.
    return lambda layer: {n: ChannelAxis() for n in names if layer._parameters.get(n, layer) is not None}


def _columns(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1)}


def _transposed(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1, groups=cast(int, layer.groups))}


def _recurrent(layer: nn.Module) -> dict[str, ChannelAxis]:
    names = cast("list[str]", layer._flat_weights_names)
    return {n: ChannelAxis() for n in names if n.startswith("weight_")}


# Layer type -> the names and channel axes of its weights. Subclasses count as well, and keep their own forward.
REGISTRY: dict[type[nn.Module], Callable[[nn.Module], dict[str, ChannelAxis]]] = {
    nn.Linear: _rows("weight"),
    nn.Conv1d: _rows("weight"),
    nn.Conv2d: _rows("weight"),
    nn.Conv3d: _rows("weight"),
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.Embedding: _columns,
    nn.EmbeddingBag: _columns,
    nn.Bilinear: _rows("weight"),
    nn.MultiheadAttention: _rows("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.LSTMCell: _rows("weight_ih", "weight_hh"),
    nn.GRUCell: _rows("weight_ih", "weight_hh"),
    nn.RNNCell: _rows("weight_ih", "weight_hh"),
}


def supported_types() -> str:
    """Returns the names of the layer types that can be quantized, for messages."""
    return ", ".join(t.__name__ for t in REGISTRY)
