"""Widths in attributes of layers that torch does not define."""

import pytest
import torch
from torch import nn

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.convert import convert, revert
from lightning_selfcompress.removal.surgery import Edit, Replacement, remove, replace_tensors


class Matrix(nn.Module):
    """A layer with a weight ``(inputs, outputs)``, its bias and attributes."""

    def __init__(self, inputs=6, outputs=8, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        vars(self).update(attributes)


def without_outputs(layer):
    convert(layer, axes={"weight": ChannelAxis(1)})
    size = layer.weight.shape[1]
    remove(
        layer, [Edit(n, d, size, (0, 3)) for n, d in (("weight", 1), ("bias", 0), ("bit_depth", 0), ("exponent", 0))]
    )
    return layer


@pytest.mark.parametrize(
    "name",
    [
        "nf",
        "out_features",
        "n_out",
        "output_dim",
        "hidden_size",
        "dim",
        "width",
        "num_channels",
        "d_ff",
        "F_out",
        "c_out",
    ],
)
def test_output_width(name):
    """An attribute with the name of a width and the size of the outputs becomes smaller with them."""
    assert getattr(without_outputs(Matrix(**{name: 8})), name) == 6


@pytest.mark.parametrize("name", ["batch_size", "head_dim", "num_heads", "every_n_steps", "seed", "kernel_size", "n"])
def test_other_numbers(name):
    """A number of another name stays, whatever it is."""
    assert getattr(without_outputs(Matrix(**{name: 8})), name) == 8


def test_square_layer():
    """Where inputs and outputs have one size, names tell them apart; a name that tells nothing stays."""
    layer = without_outputs(Matrix(8, 8, nf=8, nx=8, out_features=8, in_features=8, dim=8))
    assert (layer.nf, layer.nx, layer.out_features, layer.in_features, layer.dim) == (6, 8, 6, 8, 8)


def test_square_layer_on_both_sides():
    """Where all dimensions of a size shrink alike, every width of that size does."""
    layer = convert(Matrix(8, 8, nf=8, nx=8, dim=8), axes={"weight": ChannelAxis(1)}).model
    names = (("weight", 0), ("weight", 1), ("bias", 0), ("bit_depth", 0), ("exponent", 0))
    remove(layer, [Edit(n, d, 8, (0, 3)) for n, d in names])
    assert (layer.nf, layer.nx, layer.dim) == (6, 6, 6)


def test_flags_and_layers_of_torch():
    """A flag is no number, and the attributes of torch's own layers are not guessed."""
    assert without_outputs(Matrix(outputs=2 + 6, dim=True)).dim is True
    norm = nn.MultiheadAttention(8, 2)
    convert(norm)
    size = norm.in_proj_weight.shape[1]
    remove(norm, [Edit("in_proj_weight", 1, size, (0, 1))])
    assert norm.embed_dim == 8


def test_layer_that_is_not_quantized():
    """A plain layer goes by the axis that is told, as when a packed file is loaded."""
    layer = revert(convert(Matrix(8, 8, nf=8, nx=8), axes={"weight": ChannelAxis(1)}))
    replace_tensors(
        layer,
        {id(layer.weight): Replacement(torch.zeros(5, 6)), id(layer.bias): Replacement(torch.zeros(6))},
        {id(layer.weight): ChannelAxis(1)},
    )
    assert (layer.nf, layer.nx) == (6, 5)
