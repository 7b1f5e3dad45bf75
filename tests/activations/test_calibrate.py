"""Activations quantized after training: close to the float network, and clear about what does not work."""

import pytest
import torch
from networks import small_net
from torch import nn

from lightning_selfcompress import SelfCompression, calibrate_activations, convert
from lightning_selfcompress.activations.layers import activated_modules, exponents_of


def images(n=16, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_more_bits_are_closer():
    """The outputs of a calibrated network come closer to the float network's with every bit."""
    torch.manual_seed(0)
    net = convert_of(small_net())
    expected = net(images()).detach()
    errors = []
    for bits in (2, 4, 6, 8):
        calibrate_activations(net, [images(seed=1)], bits=bits)
        errors.append(float((net(images()).detach() - expected).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(expected.std())


def convert_of(net):
    convert(net)
    return net.eval()


def test_modes_stay():
    """Calibration evaluates and gives each module the mode that it had; statistics and gradients stay."""
    net = small_net().train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calibrate_activations(net, [images()])
    assert [m.training for m in net] == [True, False, True, True, True, True, True]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in net.parameters())


def test_labels_are_left_out():
    """Of batches with labels, what forward does not take is left out; all batches count."""
    one, two = small_net(), small_net()
    two.load_state_dict(one.state_dict())
    calibrate_activations(one, [images(), images(seed=2) * 5])
    calibrate_activations(two, [(images(), torch.zeros(16)), [images(seed=2) * 5, torch.zeros(16)]])
    exponents = [[float(exponents_of(m)) for _, m in activated_modules(net)] for net in (one, two)]
    assert exponents[0] == exponents[1]
    calibrate_activations(two, [images()])
    assert exponents[0][0] > float(exponents_of(two[0]))


@pytest.mark.parametrize("bits", [1, 9, 8.0, True, "8", None])
def test_bits_out_of_range(bits):
    """Any other bit depth is refused, with what is accepted."""
    with pytest.raises(ValueError, match=r"Expected activations in a whole number of bits from 2 to 8, got "):
        calibrate_activations(small_net(), [images()], bits=bits)
    if bits is not None:
        with pytest.raises(ValueError, match=r"Expected activations in a whole number of bits from 2 to 8, got "):
            SelfCompression(gamma=1.0, activations=bits)


def test_no_batches():
    """Without a batch there is no range."""
    with pytest.raises(ValueError, match=r"Expected batches to calibrate activations with, got none\."):
        calibrate_activations(small_net(), [])


def test_a_batch_that_does_not_fit():
    """A batch that the network does not take is told with its shapes, and the network stays as it was."""
    net = small_net()
    with pytest.raises(ValueError, match=r"Expected batches that Sequential\.forward\(\) takes, got \(2, 3\): Runtime"):
        calibrate_activations(net, [torch.randn(2, 3)])
    assert not any(activated_modules(net))
    assert net.training


@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Embedding(3, 2))], ids=["ReLU", "Embedding"]
)
def test_nothing_to_quantize(net):
    """A network without a layer that reads activations is refused."""
    x = torch.tensor([0, 2]) if isinstance(net[0], nn.Embedding) else torch.randn(2)
    with pytest.raises(ValueError, match=r"linear layers or convolutions .* found none in this Sequential\."):
        calibrate_activations(net, [x])
