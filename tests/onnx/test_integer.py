"""ONNX files for integer kernels: what ONNX Runtime makes of them, and what they compute."""

import numpy as np
import pytest
import torch
from onnx_sessions import kinds, onnx, run, runtime, session
from torch import nn
from torch.nn.functional import relu

from lightning_selfcompress import calibrate_activations, convert, export, load, to_onnx

pytestmark = pytest.mark.onnx


class Block(nn.Module):
    """A residual block whose sum is made in place, with one module for both rectifiers."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)


class FunctionalBlock(Block):
    """The same with functions."""

    def forward(self, x):
        out = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(out)) + self.short(x))


def resnet(block):
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        *stem, block(8, 8, 1), block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def lenet():
    first = [nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 5))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))


IMAGES = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def made(net, *, bits=8, depth=6.0):
    """A network with integer weights, statistics of its own, and calibrated activations."""
    torch.manual_seed(0)
    net = net()
    convert(net, initial_bits=depth)
    with torch.no_grad():
        for _ in range(20):
            net(IMAGES if not isinstance(net[0], nn.Linear) else IMAGES[:, 0])
    return calibrate_activations(net.eval(), [(inputs_of(net),)], bits=bits)


def inputs_of(net):
    return IMAGES[:, 0] if isinstance(net[0], nn.Linear) else IMAGES


def operators(path, folder):
    """The operators of a file after ONNX Runtime has rewritten it, without what is processor-specific."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("net", "integer"),
    [
        (lenet, {"QLinearConv": 2, "QGemm": 2}),
        (lambda: resnet(Block), {"QLinearConv": 6, "QLinearAdd": 2, "QGemm": 1}),
        (lambda: resnet(FunctionalBlock), {"QLinearConv": 6, "QLinearAdd": 2, "QGemm": 1}),
    ],
)
def test_layers_and_sums_run_in_integers(net, integer, tmp_path):
    """Every convolution, linear layer and residual sum is one integer operator, and none is left in float."""
    to_onnx(made(net), tmp_path / "net.onnx", IMAGES[:2])
    found = operators(tmp_path / "net.onnx", tmp_path)
    assert {kind: found.count(kind) for kind in integer} == integer
    assert not {"Conv", "FusedConv", "Gemm", "Add", "BatchNormalization"} & set(found)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("net", [lenet, lambda: resnet(Block), mlp])
def test_outputs_are_torchs(net, bits, tmp_path):
    """Outputs differ by a rounding of halves here and there; the largest is nearly always the same."""
    model = made(net, bits=bits)
    x = inputs_of(model)
    to_onnx(model, tmp_path / "net.onnx", x[:2])
    (found,) = run(session(tmp_path / "net.onnx"), [x])
    expected = model(x).detach()
    spread = float(expected.max() - expected.min())
    assert float((found - expected).abs().mean()) < (2e-3 if bits == 8 else 2e-2) * spread
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) >= (0.99 if bits == 8 else 0.95)


def test_biases_are_integers_of_the_right_size(tmp_path):
    """A bias is stored in steps of input times weight, to within half a step."""
    model = made(lenet)
    to_onnx(model, tmp_path / "net.onnx", IMAGES[:2])
    proto = onnx.load(tmp_path / "net.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    biases = [name for name in stored if name.endswith("bias_codes")]
    assert len(biases) == 4
    for name in biases[1:]:  # batch normalization was folded into the first
        scale, codes = stored[name.replace("codes", "scale")], stored[name]
        bias = model.get_parameter(name.removesuffix("_codes")).detach().numpy()
        assert codes.dtype == np.int32
        assert np.abs(codes * scale - bias).max() <= 0.51 * scale.max()


def test_without_activations(tmp_path):
    """``activations=False`` and other forms of the weights leave activations in float."""
    model = made(lenet)
    for settings in ({"activations": False}, {"weights": "multiply"}, {"weights": "float"}):
        to_onnx(model, tmp_path / "net.onnx", IMAGES[:2], **settings)
        assert "QuantizeLinear" not in kinds(tmp_path / "net.onnx")


def test_file_of_a_packed_network(tmp_path):
    """A network that ``load`` has filled is written with the integers of its packed file."""
    model = made(lenet)
    export(model, tmp_path / "net.scnn")
    plain = load(tmp_path / "net.scnn", into=lenet()).eval()
    to_onnx(plain, tmp_path / "net.onnx", IMAGES[:2], codes=tmp_path / "net.scnn")
    assert operators(tmp_path / "net.onnx", tmp_path).count("QLinearConv") == 2


def test_the_fastest_form_is_kept(tmp_path):
    """All forms are timed, and the file is the one of the least time."""
    report = to_onnx(made(lenet), tmp_path / "net.onnx", IMAGES[:1], fastest=True)
    assert report.times.keys() == {"float", "multiply", "dequantize", "integer"}
    assert report.form == min(report.times, key=report.times.get)
    assert f"{report.form} {report.times[report.form]:.3g} ms (kept)" in str(report)
    assert ("QuantizeLinear" in kinds(tmp_path / "net.onnx")) == (report.form == "integer")
    assert report.nbytes == (tmp_path / "net.onnx").stat().st_size
    assert to_onnx(convert(mlp()).model, tmp_path / "net.onnx", IMAGES[:1, 0], fastest=True).times.keys() == {
        "float",
        "multiply",
        "dequantize",
    }


def test_the_fastest_needs_a_runtime(tmp_path, monkeypatch):
    """Without ONNX Runtime the error says what to install, and no file is written."""
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match="pip install onnxruntime"):
        to_onnx(made(mlp), tmp_path / "net.onnx", IMAGES[:1, 0], fastest=True)
    assert not (tmp_path / "net.onnx").exists()


def test_wrong_calls(tmp_path):
    """Networks without quantized activations, and forms that integer kernels do not take, are refused."""
    float_activations = convert(mlp()).model
    with pytest.raises(ValueError, match="calibrate_activations"):
        to_onnx(float_activations, tmp_path / "net.onnx", IMAGES[:1, 0], activations=True)
    with pytest.raises(ValueError, match="weights='dequantize'"):
        to_onnx(made(mlp), tmp_path / "net.onnx", IMAGES[:1, 0], activations=True, weights="multiply")
    with pytest.raises(ValueError, match="Expected inputs that Sequential"):
        to_onnx(made(mlp), tmp_path / "net.onnx", torch.randn(1, 7))
