"""Constants in ONNX files: dead branches become what they emit, and nothing else changes."""

import pytest
import torch
from onnx_sessions import assert_close, kinds, run, session
from shrunken import outputs
from torch import nn
from zoo import ZOO

from lightning_selfcompress import convert, to_onnx

onnx = pytest.importorskip("onnx")

SOON = ("resnet_basic", "se_resnet", "grouped_transposed", "vit", "lstm_classifier")
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """``x + norm(conv(act(norm(conv(x)))))``, as in ResNets."""

    def __init__(self, act=nn.ReLU, channels=4):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), act()
        self.conv2, self.bn2 = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        nn.init.normal_(self.bn2.bias)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


def killed(net, *, constants=True):
    """A network whose first inner layers are dead."""
    torch.manual_seed(0)
    net = net.eval()
    convert(net)
    for module in net.modules():
        if isinstance(module, Residual):
            module.conv1.bit_depth.data.fill_(-1)
            if constants:
                for vector in (module.conv1.bias, module.bn1.weight, module.bn1.bias):
                    vector.data.zero_()
    return net


def count(path, kind):
    return sum(n.op_type == kind for n in onnx.load(path).graph.node)


def written(net, path, **kwargs):
    report = to_onnx(net, path, IMAGES, **kwargs)
    for images in (IMAGES, IMAGES[:1]):
        assert_close(run(session(path, once=True), (images,)), [net(images).detach()])
    return report


def test_a_dead_branch_is_its_last_bias(tmp_path):
    """Both layers go, with their weights; the constant is added where the branch was."""
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), nn.Conv2d(4, 2, 1)))
    before = written(net, tmp_path / "whole.onnx", fold=False)
    after = written(net, tmp_path / "folded.onnx")
    assert count(tmp_path / "whole.onnx", "Conv") == 4
    assert count(tmp_path / "folded.onnx", "Conv") == 2
    assert count(tmp_path / "folded.onnx", "Add") == 0
    names = {t.name for t in onnx.load(tmp_path / "folded.onnx").graph.initializer}
    assert not {n for n in names if n.startswith("1.conv")}
    assert after.types == before.types | {"1.conv1.weight": "constant", "1.conv2.weight": "constant"}
    assert "2 weights in branches that emit constants" in str(after)


def test_a_constant_after_an_activation(tmp_path):
    """Where no layer's bias can take it the constant is added, and of two ReLU one is left."""
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), Residual(), nn.ReLU(), Residual(), nn.Conv2d(4, 2, 1)))
    nn.init.zeros_(net[4].bn2.bias)
    net.insert(5, nn.ReLU())
    written(net, tmp_path / "net.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type != "DequantizeLinear"] == [
        *("Conv", "Relu", "Add", "Relu", "Conv")
    ]


def test_a_branch_of_zeros_is_nothing(tmp_path):
    """Where the branch ends in zeros the sum goes too, unless it is an output, which keeps its name."""
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), nn.Conv2d(4, 2, 1)))
    nn.init.zeros_(net[1].bn2.bias)
    written(net, tmp_path / "net.onnx")
    assert count(tmp_path / "net.onnx", "Add") == 0
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), Residual()))
    nn.init.zeros_(net[1].bn2.bias)
    written(net, tmp_path / "net.onnx")


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.Sigmoid])
def test_constants_that_are_not_zero(act, tmp_path):
    """What a convolution with padding makes of a constant differs at the edges: it is computed as before."""
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(act), nn.Conv2d(4, 2, 1)), constants=False)
    nn.init.constant_(net[1].bn1.bias, 0.7)
    written(net, tmp_path / "net.onnx")
    assert count(tmp_path / "net.onnx", "Conv") >= 3


class Gate(nn.Module):
    """Constants that meet tensors of other shapes, and outputs that are constant."""

    def __init__(self):
        super().__init__()
        self.gate, self.dead, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return (
            pooled * torch.sigmoid(self.dead(x)),
            torch.cat([x, self.dead(x)], 1),
            self.dead(x),
            self.out(pooled[..., 0, 0]),
        )


def test_constants_that_stay(tmp_path):
    """Where shapes hang on the constant tensor, or it is an output, it is computed as before."""
    net = Gate().eval()
    convert(net)
    net.dead.bit_depth.data.fill_(-1)
    net.out.bit_depth.data.fill_(-1)
    to_onnx(net, tmp_path / "net.onnx", IMAGES)
    for images in (IMAGES, IMAGES[:1]):
        assert_close(run(session(tmp_path / "net.onnx"), (images,)), [t.detach() for t in net(images)])


class Mlp(nn.Module):
    """A residual block of linear layers on any number of dimensions."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(6, n) for n in (6, 3, 6, 2))
        self.down = nn.Linear(3, 6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


def killed_mlp():
    net = Mlp().eval()
    convert(net)
    net.up.bit_depth.data.fill_(-1)
    net.up.bias.data.zero_()
    return net


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6)])
def test_linear_layers(shape, tmp_path):
    """Gemm of matrices, MatMul and Add of others."""
    net = killed_mlp()
    x = torch.randn(shape)
    report = to_onnx(net, tmp_path / "net.onnx", x)
    assert [n for n, kind in report.types.items() if kind == "constant"] == ["up.weight", "down.weight"]
    assert count(tmp_path / "net.onnx", "Gemm") + count(tmp_path / "net.onnx", "MatMul") == 2
    assert_close(run(session(tmp_path / "net.onnx"), (x[:1],)), [net(x[:1]).detach()])


class Branches(nn.Module):
    """Branches beside each other, and parameters of names that new tensors would have."""

    NAMES = ("conv2d_bias", "conv2d_2_constant", "whole_0_0_0_0_5_0_0_0")

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(4, 9, 3, padding=1), nn.Conv2d(9, 9, 1)
        self.branches = nn.ModuleList(Residual(channels=9) for _ in range(3))
        for name in self.NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(9, 1, 1)))

    def forward(self, x):
        x = self.stem(x)
        dead = [b.bn2(b.conv2(b.bn1(b.conv1(x)).relu())) for b in self.branches]
        for branch in dead:
            x = x + branch
        for name in self.NAMES:
            x = x * self.get_parameter(name)
        return self.head(x.relu())


@pytest.mark.parametrize("round_to", [1, 7])
def test_several_constants_and_names_that_are_taken(round_to, tmp_path):
    """A bias takes in one constant after another; new tensors have names of their own."""
    report = written(killed(Branches()), tmp_path / "net.onnx", round_to=round_to)
    assert list(report.types.values()).count("constant") == 6
    assert "none" not in report.types.values()
    assert count(tmp_path / "net.onnx", "Add") == 0


def test_whole_blocks_beside_constants(tmp_path):
    """Widths are rounded through the sum with a constant."""
    net = nn.Sequential(nn.Conv2d(4, 9, 3), Residual(channels=9), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.Conv2d(9, 2, 1))
    written(killed(net), tmp_path / "net.onnx", round_to=8)
    assert "Slice" not in kinds(tmp_path / "net.onnx")


def test_float_weights_and_float64(tmp_path):
    """Without DequantizeLinear weights of zeros are seen as well, in every precision."""
    net = killed(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), nn.Conv2d(4, 2, 1)))
    report = written(net, tmp_path / "net.onnx", weights="float")
    assert list(report.types.values()).count("constant") == 2
    net, x = killed_mlp().double(), torch.randn(3, 5, 6).double()
    with pytest.warns(UserWarning, match="float64"):
        to_onnx(net, tmp_path / "net.onnx", x)
    assert count(tmp_path / "net.onnx", "MatMul") == 2
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), [net(x).detach()])


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.nightly) for n in ZOO])
def test_dead_layers_anywhere(name, tmp_path):
    """Half of the layers dead, their neighbours' constants zero or not: outputs are torch's, widths rounded or not."""
    torch.manual_seed(1)
    net, inputs = ZOO[name].make().eval(), ZOO[name].inputs()
    convert(net)
    for parameter_name, parameter in net.named_parameters():
        if parameter_name.endswith("bit_depth") and torch.rand(()) < 0.5:
            parameter.data.fill_(-1)
        elif parameter_name.endswith("bias") and torch.rand(()) < 0.5:
            parameter.data.zero_()
    expected = outputs(net, inputs)
    for round_to in (1, 7):
        to_onnx(net, tmp_path / "net.onnx", *inputs, round_to=round_to)
        for once in (False, True):
            assert_close(run(session(tmp_path / "net.onnx", once=once), inputs), expected)


class Around(nn.Module):
    """A layer, and a branch that emits a constant by channels or by places, which meet in one of several ways."""

    def __init__(self, meet):
        super().__init__()
        self.conv, self.dead, self.meet = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), meet
        self.places = nn.Parameter(torch.randn(5, 4, 4))
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.meet(self, self.conv(x), self.dead(x), x)


MEETINGS = {
    "used again, later": lambda net, y, c, x: (y + c).relu() + (y + net.dead(x)) * y,
    "used again, by another name": lambda net, y, c, x: ((z := y + 0 * c) + c) * net.other(z),
    "an output too": lambda net, y, c, x: (y, (y + c).relu()),
    "of the input": lambda net, y, c, x: (x + c).relu() + y,
    "by places": lambda net, y, c, x: (y + (c * net.places[0])).relu(),
    "by places of one row": lambda net, y, c, x: (y + (c * net.places[0, :1])).relu(),
    "maxima of places": lambda net, y, c, x: y + nn.functional.max_pool2d(c * net.places[0], 3, 1, 1),
    "means of places": lambda net, y, c, x: y + nn.functional.adaptive_avg_pool2d(c * net.places[0], 1),
}


@pytest.mark.parametrize("weights", ["multiply", "float"])
@pytest.mark.parametrize("name", MEETINGS)
def test_where_constants_go(name, weights, tmp_path):
    """Into a bias only where nobody else sees it, and where they are the same at all places."""
    net = Around(MEETINGS[name])
    convert(net)
    net.dead.bit_depth.data.fill_(-1)
    images = torch.randn(2, 4, 4, 4)
    net.eval()
    to_onnx(net, tmp_path / "net.onnx", images, weights=weights)
    expected = net(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert_close(run(session(tmp_path / "net.onnx"), (images,)), [t.detach() for t in expected])
