"""Parameters whose output channels are found by the operations that use them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as user code names it

from lightning_selfcompress.channels.weight_roles import NOT_SEEN, WeightRoles
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.convert import convert

X = torch.randn(5, 7)
BATCH = torch.randn(2, 5, 7)
IMAGES = torch.randn(2, 4, 6, 6)
NUMBERS = torch.tensor([0, 1, 1])
FIRST, SECOND = ChannelAxis(0), ChannelAxis(1)


def found(shape, use, **others):
    """What is found of a parameter ``w`` of a shape that a function of its module uses."""
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape))
    for name, tensor in others.items():
        module.register_parameter(name, tensor) if isinstance(tensor, nn.Parameter) else module.register_buffer(
            name, tensor
        )
    with WeightRoles(module) as roles:
        use(module)
    return roles.axes()


AXES = {
    "F.linear": ((3, 7), lambda m: F.linear(X, m.w), FIRST),
    "F.linear of a batch": ((3, 7), lambda m: F.linear(BATCH.transpose(0, 1), m.w), FIRST),
    "F.linear of the transpose": ((7, 3), lambda m: F.linear(BATCH, m.w.t()), SECOND),
    "addmm": ((7, 3), lambda m: torch.addmm(torch.zeros(3), X, m.w), SECOND),
    "x @ w": ((7, 3), lambda m: BATCH @ m.w, SECOND),
    "w @ x": ((3, 7), lambda m: m.w @ X.t(), FIRST),
    "w @ a batch": ((3, 7), lambda m: m.w @ BATCH.transpose(1, 2), FIRST),
    "w.T @ x": ((7, 3), lambda m: m.w.T @ X.t(), SECOND),
    "a vector @ w": ((7, 3), lambda m: X[0] @ m.w, SECOND),
    "w @ a vector": ((3, 7), lambda m: m.w @ X[0], FIRST),
    "one output": ((1, 7), lambda m: F.linear(X, m.w), FIRST),
    "one output, second": ((7, 1), lambda m: X @ m.w, SECOND),
    "bmm": ((2, 7, 3), lambda m: torch.bmm(BATCH, m.w), ChannelAxis(2, 2)),
    "bmm of the transpose": ((2, 3, 7), lambda m: torch.bmm(BATCH, m.w.mT), ChannelAxis(1, 2)),
    "bmm, weight first": ((2, 3, 7), lambda m: torch.bmm(m.w, BATCH.mT), ChannelAxis(1, 2)),
    "baddbmm": ((2, 7, 3), lambda m: torch.baddbmm(torch.zeros(2, 1, 3), BATCH, m.w), ChannelAxis(2, 2)),
    "one expert at a time": ((4, 3, 7), lambda m: [F.linear(X, m.w[i]) for i in (0, 2)], ChannelAxis(1, 4)),
    "experts unbound": ((4, 7, 3), lambda m: [X @ w for w in m.w], ChannelAxis(2, 4)),
    "experts picked": ((4, 7, 3), lambda m: torch.bmm(torch.randn(3, 1, 7), m.w[NUMBERS]), ChannelAxis(2, 4)),
    "experts grouped": (
        (2, 8, 16),
        lambda m: torch._grouped_mm(torch.randn(4, 8), m.w, offs=torch.tensor([2, 4], dtype=torch.int32)),
        ChannelAxis(2, 2),
    ),
    "einsum": ((7, 3), lambda m: torch.einsum("bti,io->bto", BATCH, m.w), SECOND),
    "einsum, rows": ((3, 7), lambda m: torch.einsum("bti,oi->bto", BATCH, m.w), FIRST),
    "einsum of heads": ((2, 7, 3), lambda m: torch.einsum("btd,hdk->bhtk", BATCH, m.w), ChannelAxis(2, 2)),
    "einsum of heads in between": ((7, 2, 3), lambda m: torch.einsum("btd,dhk->bthk", BATCH, m.w), ChannelAxis(2)),
    "einsum over heads": (
        (2, 3, 6),
        lambda m: torch.einsum("bhtk,hkd->btd", torch.randn(2, 2, 5, 3), m.w),
        ChannelAxis(2),
    ),
    "tensordot": ((7, 3), lambda m: torch.tensordot(BATCH, m.w, dims=1), SECOND),
    "conv1d": ((6, 7, 3), lambda m: F.conv1d(BATCH.mT, m.w), FIRST),
    "conv2d": ((6, 4, 3, 3), lambda m: F.conv2d(IMAGES, m.w), FIRST),
    "conv2d in groups": ((6, 2, 3, 3), lambda m: F.conv2d(IMAGES, m.w, groups=2), FIRST),
    "conv2d of a view": ((6, 36), lambda m: F.conv2d(IMAGES, m.w.view(6, 4, 3, 3)), FIRST),
    "conv_transpose2d": ((4, 6, 3, 3), lambda m: F.conv_transpose2d(IMAGES, m.w), SECOND),
    "conv_transpose2d in groups": (
        (4, 3, 3, 3),
        lambda m: F.conv_transpose2d(IMAGES, m.w, groups=2),
        ChannelAxis(1, 2),
    ),
    "embedding": ((9, 3), lambda m: F.embedding(NUMBERS, m.w), SECOND),
    "embedding_bag": ((9, 3), lambda m: F.embedding_bag(NUMBERS[None], m.w), SECOND),
    "bilinear": ((3, 7, 5), lambda m: F.bilinear(X, torch.randn(5, 5), m.w), FIRST),
    "scaled": ((3, 7), lambda m: F.linear(X, m.w / 2), FIRST),
    "vectors of attention": ((1, 5, 7), lambda m: (torch.randn(6, 5, 7) * m.w).sum(-1), SECOND),
    "vectors of attention, other order": ((7, 5), lambda m: (m.w.t() * torch.randn(6, 5, 7)).sum(dim=2), SECOND),
    "vectors of attention, in another type": ((5, 7), lambda m: (X.bfloat16() * m.w.bfloat16()).float().sum(1), FIRST),
    "in parts": ((6, 7), lambda m: [F.linear(X, part) for part in m.w.chunk(2)], FIRST),
    "in another type": ((3, 7), lambda m: F.linear(X.bfloat16(), m.w.bfloat16()), FIRST),
    "beside a penalty": ((3, 7), lambda m: F.linear(X, m.w).sum() + m.w.square().sum(), FIRST),
}


@pytest.mark.parametrize("name", AXES)
def test_axis(name):
    """The output channels lie along the dimension that the product keeps, whatever the orientation."""
    shape, use, axis = AXES[name]
    assert found(shape, use) == {"w": axis}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_axis_in_other_modes(context):
    """The axis is found with and without autograd, and under autocast."""

    def use(m):
        with context():
            F.linear(BATCH, m.w)

    assert found((3, 7), use) == {"w": FIRST}


FLOATS = {
    "added": ((5, 7), lambda m: X + m.w, NOT_SEEN),
    "squashed": ((5, 5), lambda m: m.w.softmax(-1) @ X, NOT_SEEN),
    "embedding that is the output layer": (
        (9, 7),
        lambda m: F.linear(F.embedding(NUMBERS, m.w), m.w),
        "embedding: dim",
    ),
    "there and back": ((7, 7), lambda m: X @ m.w @ m.w.t(), "disagree about its output channels (mm: dimension 1"),
    "summed as a whole": ((5, 7), lambda m: torch.tensordot(BATCH, m.w, dims=2), "makes no output channels"),
    "one value per channel": ((4, 1, 1, 1), lambda m: F.conv2d(IMAGES, m.w, groups=4), "one value per channel"),
    "rows picked": ((9, 7), lambda m: F.linear(X, m.w[NUMBERS]), "makes no output channels"),
    "viewed across": (
        (6, 4),
        lambda m: F.linear(torch.randn(5, 12), m.w.view(2, 12)),
        "has dimensions of which a part is summed over",
    ),
    "a scale": ((5, 7), lambda m: (X * m.w).relu(), NOT_SEEN),
    "a scale of channels": ((1, 4, 1, 1), lambda m: (IMAGES * m.w).sum((2, 3)), NOT_SEEN),
    "a scale before a shift": ((5, 7), lambda m: (X * m.w + 1).sum(-1), NOT_SEEN),
    "a scale of all that is summed": ((1, 7), lambda m: (X * m.w).sum(-1), NOT_SEEN),
    "a sum of everything": ((5, 7), lambda m: (X * m.w).sum(), NOT_SEEN),
    "a product that is used twice": (
        (5, 7),
        lambda m: [(y := X * m.w).sum(-1), y.relu()],
        "disagree about its output channels (sum: dimension 0, mul: makes no output channels)",
    ),
    "never used": ((3, 7), lambda m: None, NOT_SEEN),
}


@pytest.mark.parametrize("name", FLOATS)
def test_no_axis(name):
    """A parameter without output channels, or of which two uses disagree, has a reason instead."""
    shape, use, reason = FLOATS[name]
    assert reason in found(shape, use)["w"]


class TestTwoParameters:
    """Operations of several parameters."""

    def test_scale(self):
        """A vector that scales a weight is no weight."""
        for shape in ((3, 1), (1, 7)):
            both = found((3, 7), lambda m: F.linear(X, m.w * m.scale), scale=nn.Parameter(torch.ones(shape)))
            assert both == {"w": FIRST, "scale": NOT_SEEN}

    def test_mask(self):
        """A weight that a buffer masks is a weight."""
        assert found((3, 7), lambda m: F.linear(X, m.w * m.mask), mask=torch.ones(3, 7)) == {"w": FIRST}

    def test_product_of_parameters(self):
        """A product of two parameters makes neither a weight."""
        both = found((5, 7), lambda m: F.linear(m.w, m.keys), keys=nn.Parameter(torch.randn(3, 7)))
        assert both == {"w": NOT_SEEN, "keys": NOT_SEEN}

    def test_low_rank(self):
        """Two factors that data pass one after the other are weights."""
        down = nn.Parameter(torch.randn(2, 7))
        assert found((3, 2), lambda m: X @ m.down.t() @ m.w.t(), down=down) == {"w": FIRST, "down": FIRST}

    def test_joined(self):
        """Weights that are concatenated before the product are weights."""
        other = nn.Parameter(torch.randn(2, 7))
        assert found((3, 7), lambda m: F.linear(X, torch.cat([m.w, m.other])), other=other) == {
            "w": FIRST,
            "other": FIRST,
        }

    def test_buffer_of_data(self):
        """A weight that multiplies a buffer is a weight: a graph's features may lie in one."""
        assert found((7, 3), lambda m: m.nodes @ m.w, nodes=X.clone()) == {"w": SECOND}

    def test_beside_quantized_weights(self):
        """A quantized weight is not looked for, and is no data either."""
        net = nn.Linear(7, 7)
        convert(net)
        net.prompt = nn.Parameter(torch.randn(2, 7))
        net.w = nn.Parameter(torch.randn(7, 3))
        with WeightRoles(net) as roles:
            net(torch.cat([net.prompt, X])) @ net.w
            F.linear(net.prompt, net.weight)
        assert roles.axes() == {"prompt": NOT_SEEN, "w": SECOND}
