"""Vectors left in float, rounded to a byte a value."""

import pytest
import torch
from networks import small_net
from torch import nn

from lightning_selfcompress import convert
from lightning_selfcompress.budget.landing import file_nbytes
from lightning_selfcompress.budget.vectors import round_vectors


def make(seed=0):
    torch.manual_seed(seed)
    net = small_net()
    convert(net, initial_bits=4)
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.1, 2)
        net[1].bias.normal_()
    return net.eval()


def test_a_byte_a_value():
    """Rounded vectors take a byte a value; weights, depths and exponents stay as they are, to the bit."""
    net = make()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    large = file_nbytes(net)
    round_vectors(net)
    vectors = sum(t.numel() for name, t in before.items() if t.dim() == 1 and "depth" not in name and "exp" not in name)
    assert file_nbytes(net) <= large - 2 * vectors
    for name, t in net.state_dict().items():
        if "depth" in name or "exponent" in name or t.dim() > 1:
            assert torch.equal(t, before[name])


@pytest.mark.parametrize("seed", range(5))
def test_outputs_change_by_little(seed):
    """In evaluation mode the outputs stay within a few percent."""
    net, images = make(seed), torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        before = net(images)
        round_vectors(net)
        change = net(images) - before
    assert float(change.abs().max()) < 0.05 * float(before.abs().max())


def test_a_channel_of_next_to_no_variance():
    """Where a channel is constant, the error of its rounded mean would be a hundred times that of the others."""
    net = nn.Sequential(nn.BatchNorm1d(8))
    constant = torch.tensor(0.3456)
    with torch.no_grad():
        net[0].running_mean.copy_(torch.tensor([5.0, -3.0, constant, 1.0, 2.0, -1.0, 0.1, 0.7]))
        net[0].running_var.copy_(torch.tensor([1.0, 2.0, 1e-12, 0.5, 0.1, 0.01, 3.0, 1.0]))
        inputs = torch.randn(9, 8)
        inputs[:, 2] = constant
        before = net.eval()(inputs)
        round_vectors(net)
        after = net(inputs)
    torch.testing.assert_close(after[:, 2], before[:, 2], rtol=0, atol=0.02 * float(before.abs().max()))
    torch.testing.assert_close(after, before, rtol=0, atol=0.05 * float(before.abs().max()))


def test_scalars_and_matrices_stay():
    """A learned scale of one number, and a table that is left in float, are not rounded."""
    net = nn.Module()
    net.scale, net.table = nn.Parameter(torch.tensor([0.123456])), nn.Parameter(torch.randn(3, 4))
    before = net.scale.clone(), net.table.clone()
    round_vectors(net)
    assert torch.equal(net.scale, before[0])
    assert torch.equal(net.table, before[1])
