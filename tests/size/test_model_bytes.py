"""The price in bytes: its value follows the file, its gradient is what autograd derives."""

import pytest
import torch
from layer_kinds import KINDS
from torch import nn
from torch.testing import assert_close
from zoo import ZOO

from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.packing import Packed, packed_size
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.size.model_bytes import CHANNEL_BITS, EMPTY, ModelBytes
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.size.rate import code_rate, zero_rate
from lightning_selfcompress.training.depth_optimizer import DepthOptimizer


def with_codes(model, seed=0):
    """The model, converted, with channels whose codes have all kinds of magnitudes, some clipped, some all zero."""
    convert(model, initial_bits=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in quantized_parameters(model):
            p.exponent.add_((torch.randn(p.channels, generator=generator) * 32).round() / 16)
            p.exponent[0] += 8
            p.raw_depth.add_(torch.randn(p.channels, generator=generator))
    return model


def coupled(seed=0):
    """A network with a residual sum, whose channels are known."""
    torch.manual_seed(seed)
    net = nn.ModuleList(
        [nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 3)]
    )
    net = with_codes(net.double(), seed)
    watcher = Watcher(net)
    with watcher:
        x = net[0](torch.randn(2, 2, 5, 5, dtype=torch.float64))
        x = net[2](x + net[1](x.relu())).relu().mean((2, 3))
        watcher.pin_outputs(net[3](x).sum(), "it is the loss")
    couple(net, watcher.channels())
    return net


def magnitude(p):
    """The mean magnitude of codes with straight-through rounding, for autograd."""
    axis, (raw, e) = p.spec.axis, p.learned
    x, b, exponent = axis.arrange(p.latent, raw, e)
    level = x / torch.exp2((exponent.detach() * 16).round() / 16)
    high = torch.exp2(b - 1) - 1
    clipped = torch.where(level < -high - 1, -high - 1, torch.where(level > high, high, level))
    codes = clipped + (clipped.round() - clipped).detach()
    codes = codes * torch.exp2(exponent.detach()) / torch.exp2(exponent)  # 1, with the derivative of 2^-e
    within = tuple(d for d, n in enumerate(b.shape) if n == 1)
    sizes = codes.abs()
    return (sizes.mean(within) if within else sizes).flatten()


def surrogate(price):
    """What the gradient is of: bits of the codes, and what each channel takes with it, as far as it is there."""
    coupling = price.coupling
    m = torch.cat([magnitude(p) for p in price.parameters])
    zeros = m.new_zeros(coupling.weights).index_add(0, coupling.weight, price.n * zero_rate(m))
    cost = coupling.input_cost(zeros, coupling.shares(coupling.alive(m + 1))).detach()
    cost = cost + CHANNEL_BITS
    floats = m.new_zeros(coupling.count + 1)
    floats[coupling.produced] = coupling.floats.to(m)
    cost = (cost + 32 * floats)[: coupling.count]
    total = m.new_zeros(coupling.count + 1).index_add(0, coupling.produced, m)[: coupling.count]
    return (
        torch.dot(price.n.to(m), code_rate(m)) + torch.dot(cost, 1 - torch.exp(-total / EMPTY))
    ) / price.original_numel


def assert_gradients(model, factor):
    price = ModelBytes.of(model)
    trained = [t for p in price.parameters for t in (p.latent, *p.learned)]
    expected = torch.autograd.grad(surrogate(price) * factor, trained, allow_unused=True)
    expected = [torch.zeros_like(t) if g is None else g for t, g in zip(trained, expected, strict=True)]
    clipped = 0
    for p, pull, by_weight in zip(
        price.parameters, price.pulls(factor), zip(*[iter(expected)] * 3, strict=True), strict=True
    ):
        p.latent.grad = torch.ones_like(p.latent)
        pull.weight(2.0)
        tolerance = {"rtol": 1e-4, "atol": 1e-9}
        assert_close(p.latent.grad - 1, 2 * by_weight[0], **tolerance | {"atol": 1e-6})
        assert_close(pull.depth, by_weight[1].to(pull.depth), **tolerance)
        assert_close(pull.exponent, by_weight[2].to(pull.exponent), **tolerance)
        clipped += int((pull.depth != 0).sum())
    return clipped


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_every_layer(kind):
    """Weights, depths and exponents get what autograd derives from the rate, clipped codes none, for every layer."""
    torch.manual_seed(0)
    assert_gradients(with_codes(KINDS[kind].make()), 7.0)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_with_channels(seed):
    """A channel pays for its consumers' zeros and its values in float as well, once where several layers make it."""
    net = coupled(seed)
    assert ModelBytes.of(net).coupling.floats.max() == 6  # two biases, and four of normalization
    assert assert_gradients(net, 3.0) > 0


def test_shares_add_up():
    """However the weights are dealt out, the shares in the price and in its gradients are those of the whole."""
    net = coupled()
    price = ModelBytes.of(net)
    shares = [price.part(price.parameters[i::2]) for i in range(2)]
    assert_close(sum(s.bits_per_weight() for s in shares), price.bits_per_weight())
    expected = {id(p.latent): pull for p, pull in zip(price.parameters, price.pulls(1.0), strict=True)}
    for share in shares:
        for p, pull in zip(share.parameters, share.pulls(1.0), strict=True):
            assert torch.equal(pull.exponent, expected[id(p.latent)].exponent)
    assert price.part([]).pulls(1.0) == ()
    assert price.part([]).bits_per_weight() == 0


def test_dead_inputs_feel_no_price():
    """Weights at dead inputs have no gradient of the price, and no share in that of their channel's depth."""
    net = coupled()
    with torch.no_grad():
        for layer in (net[0], net[1]):
            layer.bit_depth[2] = -1.0
        net[3].latent("weight")[:, 2] = 100.0  # clipped, whatever the range

    def pull():
        price = ModelBytes.of(net)
        return next(pull for p, pull in zip(price.parameters, price.pulls(5.0), strict=True) if p.layer is net[3])

    net[3].latent("weight").grad = torch.zeros(3, 6, dtype=torch.float64)
    with_dead = pull()
    with_dead.weight(1.0)
    gradient = net[3].latent("weight").grad
    assert not bool(gradient[:, 2].any())
    assert bool(gradient[:, [0, 1, 3, 4, 5]].any())
    with torch.no_grad():
        net[3].latent("weight")[:, 2] = 0.0
    assert_close(with_dead.depth, pull().depth)


def test_of_nothing():
    """A model without quantized weights costs nothing."""
    assert ModelBytes.of(nn.Linear(3, 4)).bits_per_weight() == 0
    assert ModelBytes.of(nn.Linear(3, 4)).pulls(1.0) == ()


EVERY_THIRD = {*sorted(ZOO)[::3], "cnn3d", "embedding_bag"}  # the latter two are the furthest off


@pytest.mark.parametrize(
    "name", [n if n in EVERY_THIRD else pytest.param(n, marks=pytest.mark.nightly) for n in sorted(ZOO)]
)
def test_follows_the_file(name):
    """After training under the price, codes and channels cost in the file what the price says, within 10% of it."""
    torch.manual_seed(0)
    net = ZOO[name].make()
    convert(net)
    inputs = ZOO[name].inputs()
    with torch.no_grad():
        out = net(*inputs)
        goal = torch.randn_like(out if isinstance(out, torch.Tensor) else out[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    price = ModelBytes.of(net)
    DepthOptimizer(optimizer, price, lr=0.03, gamma=lambda: 1.0).attach()
    for _ in range(150):
        out = net(*inputs)
        optimizer.zero_grad()
        ((out if isinstance(out, torch.Tensor) else out[0]) - goal).square().mean().backward()
        optimizer.step()
    packed = packed_size(Packed.of(net))
    rest = sum(packed.values.values()) + packed.structure_nbytes
    priced = float(price.bits_per_weight()) * price.original_numel / 8
    assert packed.code_nbytes < 0.8 * float((price.n * 8).sum()) / 8
    assert priced + rest == pytest.approx(packed.nbytes, rel=0.1)
    by_depths = float(ModelSize.of(net).bits_per_weight()) * price.original_numel / 8
    assert abs(priced + rest - packed.nbytes) < abs(by_depths + rest - packed.nbytes)
