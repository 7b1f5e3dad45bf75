"""The landing: codes are moved, the cheapest first, until the file is within its size."""

import pytest
import torch
from depths import mixed_net, with_depths
from networks import small_net

from lightning_selfcompress import convert, export
from lightning_selfcompress.budget.landing import curvatures, file_nbytes, land
from lightning_selfcompress.budget.vectors import round_vectors
from lightning_selfcompress.quantize.parameters import quantized_parameters


def codes_of(net):
    return [(getattr(p.layer, p.weight_name).detach() / 2**-20).round() for p in quantized_parameters(net)]


def sparse_net(seed=0):
    torch.manual_seed(seed)
    net = small_net()
    convert(net, initial_bits=4)
    with torch.no_grad():
        for p in quantized_parameters(net):
            p.exponent.add_(1)
    return net


@pytest.mark.parametrize("share", [0.999, 0.97, 0.8, 0.6])
def test_ends_just_under_the_target(share, tmp_path):
    """The file is at or under the target and at most 0.5% or 8 bytes below it, and it is the network's own file."""
    net = sparse_net()
    round_vectors(net)
    target = int(file_nbytes(net) * share)
    landing = land(net, target)
    assert target - max(8, target / 200) <= landing.after <= target
    assert landing.after == file_nbytes(net) == export(net, tmp_path / "net.scnn")
    assert landing.moved > 0


def test_changes_nothing_that_is_small_enough():
    """A network within its size stays as it is, to the bit."""
    net = sparse_net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    landing = land(net, file_nbytes(net))
    assert landing.moved == 0
    assert landing.before == landing.after
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_says_what_cannot_be_reached():
    """Where no code is left to be moved, the landing is above its target."""
    net = sparse_net()
    landing = land(net, 10)
    assert landing.after > 10
    assert all(not bool(getattr(p.layer, p.weight_name).any()) for p in quantized_parameters(net))


def test_moves_one_step_towards_zero():
    """A code moves by one step, and never across zero; other codes stay."""
    net = sparse_net()
    known = [p.quantized() for p in quantized_parameters(net)]
    before = [(v * k.inverse).round() for v, k in known]
    land(net, int(file_nbytes(net) * 0.98))
    for p, old, (_, k) in zip(quantized_parameters(net), before, known, strict=True):
        new = (p.quantized()[0] * k.inverse).round()
        assert bool(((old - new == 0) | (old - new == old.sign())).all())


def test_minds_what_the_loss_minds():
    """Codes of weights that matter a thousand times as much are the last to be moved."""
    net = sparse_net()
    first, *others = quantized_parameters(net)
    importance = {id(p.latent): torch.full_like(p.latent, 1.0) for p in others}
    importance[id(first.latent)] = torch.full_like(first.latent, 1e6)
    before = first.quantized()[0].clone()
    land(net, int(file_nbytes(net) * 0.93), importance)
    assert torch.equal(first.quantized()[0], before)


def test_every_kind_of_layer():
    """Groups, recurrent layers, attention and embeddings are moved as well."""
    torch.manual_seed(0)
    net = with_depths(mixed_net(), 2.0, 6.0)
    target = int(file_nbytes(net) * 0.9)
    assert target * 0.98 < land(net, target).after <= target


def test_curvatures_are_mean_squared_gradients():
    """Adam's second moments are found for quantized weights; other optimizers have none."""
    net = sparse_net()
    adam = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    adam.step()
    found = curvatures(net, [adam])
    for p in quantized_parameters(net):
        assert found[id(p.latent)] is adam.state[p.latent]["exp_avg_sq"]
    assert curvatures(net, [torch.optim.SGD(net.parameters(), lr=0.1)]) == {}


def test_from_far_above_steps_become_coarser():
    """A network of eight bits lands at a third of its size with most of its codes where they round to, not at zero."""
    torch.manual_seed(0)
    net = small_net().eval()
    convert(net, initial_bits=8)
    images = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        before = net(images)
        round_vectors(net)
        target = file_nbytes(net) // 3
        landing = land(net, target)
        after = net(images)
    assert 0.97 * target <= landing.after <= target
    assert landing.moved < 0.5 * landing.weights
    assert float((after - before).norm() / before.norm()) < 0.35
