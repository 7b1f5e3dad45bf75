"""Which layers can be quantized: for each type its weights and where their output channels lie."""

from collections.abc import Callable
from typing import cast

from torch import nn

from lightning_selfcompress.quantize.layers import ChannelAxis


def _rows(*names: str) -> Callable[[nn.Module], dict[str, ChannelAxis]]:
    # a name registered as None is a weight the layer does without; one not registered was taken away by a hook
    return lambda layer: {n: ChannelAxis() for n in names if layer._parameters.get(n, layer) is not None}


def _columns(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1)}


def _transposed(layer: nn.Module) -> dict[str, ChannelAxis]:
    return {"weight": ChannelAxis(dim=1, groups=cast(int, layer.groups))}


def _recurrent(layer: nn.Module) -> dict[str, ChannelAxis]:
    names = cast("list[str]", layer._flat_weights_names)
    return {n: ChannelAxis() for n in names if n.startswith("weight_")}


# Layer type -> its weights and where their output channels lie. Subclasses that keep their own forward count as well.
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
    """Names of the layer types that can be quantized, for messages."""
    return ", ".join(t.__name__ for t in REGISTRY)
