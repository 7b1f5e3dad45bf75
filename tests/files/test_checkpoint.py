"""Shapes on load: a network takes the shapes of a compressed checkpoint."""

import copy

import pytest
import torch
from killing import half_removed, watched
from zoo import ZOO

from lightning_selfcompress.files.checkpoint import take_shapes
from lightning_selfcompress.quantize.convert import convert


@pytest.mark.parametrize(
    "name",
    [
        "lenet",
        "vgg_bn",
        "mobilenet_v2",
        "grouped_transposed",
        "group_norm",
        "prelu",
        "einsum",
        "embedding_bag",
        "lstm_classifier",
    ],
)
def test_a_network_takes_the_shapes_of_a_checkpoint(name):
    """Smaller for a fresh network, larger for one that shrank meanwhile; attributes, keys and outputs follow."""
    torch.manual_seed(0)
    full, inputs = ZOO[name].make(), ZOO[name].inputs()
    convert(full)
    channels, _ = watched(full, *inputs)
    small, _ = half_removed(full, channels)
    fresh = ZOO[name].make()
    convert(fresh)
    for source, target in ((small, fresh), (full, small)):
        wanted = copy.deepcopy(source).eval()
        target.register_load_state_dict_pre_hook(take_shapes)
        target.load_state_dict(source.state_dict())
        assert str(target) == str(source)
        assert all(torch.equal(a, b) for a, b in zip(wanted(*inputs), target.eval()(*inputs), strict=True))
        target.train()


def test_weights_stay_laid_out_as_they_are():
    """A network whose channels lie last has them last in its smaller shapes too."""
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, n, 3)).to(memory_format=torch.channels_last) for n in (4, 8)]
    for net in nets:
        convert(net)
    nets[1].register_load_state_dict_pre_hook(take_shapes)
    nets[1].load_state_dict(nets[0].state_dict())
    assert nets[1][0].latent("weight").stride() == nets[0][0].latent("weight").stride()


def test_the_state_of_a_float_network_changes_no_shape():
    """Without bit depths there is nothing to go by: a mismatch stays an error."""
    net, other = (torch.nn.Sequential(torch.nn.Linear(4, n)) for n in (3, 5))
    convert(net)
    net.register_load_state_dict_pre_hook(take_shapes)
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(other.state_dict())
