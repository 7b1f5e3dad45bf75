"""ONNX files: integer weights that are torch's to the bit, the same outputs, whole or not at all."""

import copy
import logging
import sys
import warnings

import pytest
import torch
from onnx_sessions import assert_close, kinds, run, session
from shrunken import outputs, shrunk
from torch import nn
from zoo import ZOO

from lightning_selfcompress import PackedFileError, convert, export, load, size_report, to_onnx
from lightning_selfcompress.demo.networks import LeNet5
from lightning_selfcompress.packing import Packed, to_rows

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
if not hasattr(torch.onnx, "ops"):
    pytest.skip("torch's exporter writes DequantizeLinear since 2.8", allow_module_level=True)

# one of each way in which a weight may lie; the others run at night
SOON = ("grouped_transposed", "char_transformer", "lstm_classifier", "embedding_bag", "bilinear", "shared_module")


def dequantized(path):
    """What ONNX Runtime makes of the codes of each weight, by the name of its codes."""
    model = onnx.load(path)
    first = [n for n in model.graph.node if n.op_type in {"DequantizeLinear", "Cast"} and n.input[0].endswith("_codes")]
    products = [n for n in model.graph.node if n.op_type == "Mul" and any(m.output[0] in n.input for m in first)]
    part = onnx.helper.make_graph(
        [*first, *products],
        "weights",
        [],
        [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in products or first],
        [t for t in model.graph.initializer if any(t.name in n.input for n in [*first, *products])],
    )
    values = session(onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=10)).run(None, {})
    return {n.input[0]: torch.from_numpy(v) for n, v in zip(first, values, strict=True)}


def test_the_lowest_code_of_a_type(tmp_path):
    """A layer whose codes go from -128 to 127 is int8, in the file as in the report, and in old opsets."""
    net = nn.Sequential(nn.Linear(4, 2))
    convert(net)
    with torch.no_grad():
        net[0].exponent.fill_(-4)
        net[0].bit_depth.fill_(8)
        net[0].latent("weight").copy_(torch.tensor([-128.0, 127, 3, 0]).div(16).expand(2, 4))
    for opset in (19, 21):
        report = to_onnx(net.eval(), tmp_path / "net.onnx", torch.eye(4), opset=opset)
        assert (report.types, report.notes) == ({"0.weight": "int8"}, ())
        stored = {t.name: t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
        assert stored["0.weight_codes"] == onnx.TensorProto.INT8
        assert_close(run(session(tmp_path / "net.onnx"), (torch.eye(4),)), [net(torch.eye(4)).detach()])


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.nightly) for n in ZOO])
def test_a_file_is_the_network(name, tmp_path):
    """Every network of the zoo has its weights to the bit, its outputs to 1e-4, and takes batches of other sizes."""
    net, inputs = shrunk(name)
    coded = {t.name: t for t in Packed.of(net).coded}
    report = to_onnx(net, tmp_path / "net.onnx", *inputs, fold=False)
    assert report.types.keys() == coded.keys()
    assert set(report.types.values()) <= {"int4", "int8", "int16"}
    assert report.notes == ()
    assert report.nbytes == (tmp_path / "net.onnx").stat().st_size
    values = dequantized(tmp_path / "net.onnx")
    assert len(values) == len(coded)
    for codes, value in values.items():
        packed = coded[codes.removesuffix("_codes").replace("lm_head", "wte")]  # tied
        expected = packed.tensor()
        expected = to_rows(expected, packed.codes.axis) if packed.codes.axis.groups > 1 else expected
        assert torch.equal(value.reshape(expected.shape), expected)
    multiplied = to_onnx(net, tmp_path / "multiply.onnx", *inputs, fold=False, weights="multiply")
    assert (multiplied.types, multiplied.notes) == (report.types, ())
    assert "DequantizeLinear" not in kinds(tmp_path / "multiply.onnx")
    products = dequantized(tmp_path / "multiply.onnx")
    assert products.keys() == values.keys()
    assert all(torch.equal(products[name], values[name]) for name in values)
    fewer = tuple(x[:3] for x in inputs) if name != "embedding_bag" else (inputs[0][:15], inputs[1][:3])
    for file, once in (("net", False), ("net", True), ("multiply", False)):
        opened = session(tmp_path / f"{file}.onnx", once=once)
        for given in (inputs, fewer):
            assert_close(run(opened, given), outputs(net, given))


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.Flatten(), nn.Linear(80, 4)
    )
    nn.init.uniform_(net[1].weight, -1.5, 1.5)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    convert(net)
    return net.eval()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_batchnorm_is_folded_into_the_scales(tmp_path):
    """Batch normalization is gone from the file, weights are integers still, and only the scales have changed."""
    net = conv_net()
    to_onnx(net, tmp_path / "folded.onnx", IMAGES)
    to_onnx(net, tmp_path / "as_it_is.onnx", IMAGES, fold=False)
    assert kinds(tmp_path / "folded.onnx") == kinds(tmp_path / "as_it_is.onnx") - {"BatchNormalization"}
    some, others = (dequantized(tmp_path / f"{n}.onnx") for n in ("folded", "as_it_is"))
    factor = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    torch.testing.assert_close(some["0.weight_codes"], others["0.weight_codes"] * factor.detach()[:, None, None, None])
    assert torch.equal(some["3.weight_codes"], others["3.weight_codes"])
    for file in ("folded", "as_it_is"):
        assert_close(run(session(tmp_path / f"{file}.onnx"), (IMAGES,)), outputs(net, (IMAGES,)))


class Both(nn.Module):
    """Uses a convolution's output with and without its normalization."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean[:] = 2.0

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_batchnorm_that_cannot_be_folded(tmp_path):
    """It stays, with the reason, and the outputs are right."""
    net = Both().eval()
    convert(net)
    with pytest.warns(UserWarning, match="Batch normalization norm stays: .* used elsewhere"):
        report = to_onnx(net, tmp_path / "net.onnx", IMAGES)
    assert len(report.notes) == 1
    assert_close(run(session(tmp_path / "net.onnx"), (IMAGES,)), outputs(net, (IMAGES,)))


# residual sums, gates that are multiplied, depthwise and grouped convolutions, concatenation, a tensor used in two ways
@pytest.mark.parametrize("name", ["resnet_basic", "se_resnet", "shufflenet_v2", "densenet"])
def test_whole_blocks_of_channels(name, tmp_path):
    """Rounded widths change no output, and add next to nothing to the file; channels dequantize as before."""
    torch.manual_seed(0)
    net, inputs = ZOO[name].make().eval(), ZOO[name].inputs()
    convert(net)
    plain = to_onnx(net, tmp_path / "plain.onnx", *inputs)
    rounded = to_onnx(net, tmp_path / "rounded.onnx", *inputs, round_to=7)
    assert "Pad" not in kinds(tmp_path / "plain.onnx")
    assert "Pad" in kinds(tmp_path / "rounded.onnx")
    assert rounded.types == plain.types
    some, others = (dequantized(tmp_path / f"{n}.onnx") for n in ("plain", "rounded"))
    assert all(torch.equal(some[k], others[k]) for k in some)
    assert_close(run(session(tmp_path / "rounded.onnx", once=True), inputs), outputs(net, inputs))
    with pytest.raises(ValueError, match="round_to >= 1"):
        to_onnx(net, tmp_path / "x.onnx", *inputs, round_to=0)


@pytest.mark.parametrize(
    ("bits", "opset", "expected"),
    [(3, 21, "int4"), (8, 21, "int8"), (12, 21, "int16"), (20, 21, "float"), (3, 18, "int8"), (12, 18, "float")],
)
def test_the_narrowest_integers(bits, opset, expected, tmp_path):
    """Codes are stored in the narrowest integers that hold them and that the operators have; others say why not."""
    net = nn.Linear(40, 8)
    convert(net, initial_bits=bits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 40), opset=opset)
    assert report.types == {"weight": expected}
    assert [str(w.message) for w in caught if "stays float" in str(w.message)] == list(report.notes)
    assert len(report.notes) == (expected == "float")
    model = onnx.load(tmp_path / "net.onnx")
    assert [o.version for o in model.opset_import if not o.domain] == [opset]
    stored = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in model.graph.initializer}
    assert stored.get("weight_codes", "float") == expected
    nbytes = {t.name: len(t.raw_data) for t in model.graph.initializer}.get("weight_codes", 0)
    assert nbytes == (0 if expected == "float" else 40 * 8 * int(expected.removeprefix("int")) // 8)
    x = torch.randn(3, 40)
    assert_close(run(session(tmp_path / "net.onnx", once=True), (x,)), outputs(net, (x,)))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2,), (2, 5)])
def test_linear_layers_get_what_they_are_given(shape, bias, bits, tmp_path):
    """ONNX Runtime does not round their inputs to int8, as it does beside some dequantized matrices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias), nn.ReLU(), nn.Linear(6, 64, bias), nn.ReLU(), nn.Linear(64, 2, bias))
    convert(net, initial_bits=bits)
    x = torch.randn(*shape, 6)
    to_onnx(net, tmp_path / "net.onnx", x)
    for once in (False, True):
        torch.testing.assert_close(run(session(tmp_path / "net.onnx", once=once), (x,))[0], net(x).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions(dtype, tmp_path):
    """Weights of half precision are dequantized in float32 and rounded, as in torch; float64 stays, and says why."""
    net = nn.Linear(8, 4).to(dtype)
    convert(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8, dtype=dtype))
    assert report.types == {"weight": "float" if dtype == torch.float64 else "int8"}
    assert report.notes == (("weight stays float: DequantizeLinear has no float64.",) * (dtype == torch.float64))
    x = torch.randn(3, 8, dtype=dtype)
    (found,), (expected,) = run(session(tmp_path / "net.onnx"), (x,)), outputs(net, (x,))
    torch.testing.assert_close(found, expected)


def test_float_weights(tmp_path):
    """On request weights are plain floats, for runtimes that know no DequantizeLinear."""
    net = conv_net()
    report = to_onnx(net, tmp_path / "net.onnx", IMAGES, weights="float")
    assert set(report.types.values()) == {"float"}
    assert report.notes == ()
    assert "DequantizeLinear" not in kinds(tmp_path / "net.onnx")
    assert_close(run(session(tmp_path / "net.onnx"), (IMAGES,)), outputs(net, (IMAGES,)))


def test_multiplied_weights_are_computed_once(tmp_path):
    """With its default settings ONNX Runtime has float weights when the file is open, and as many bytes on the disk."""
    net = LeNet5().net
    convert(net)
    x = torch.randn(1, 1, 28, 28)
    sizes = [to_onnx(net, tmp_path / f"{form}.onnx", x, weights=form).nbytes for form in ("dequantize", "multiply")]
    assert sizes[1] <= 1.01 * sizes[0]
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "open.onnx")
    runtime.InferenceSession(str(tmp_path / "multiply.onnx"), options, providers=["CPUExecutionProvider"])
    assert not kinds(tmp_path / "open.onnx") & {"Cast", "Mul", "DequantizeLinear"}
    with pytest.raises(ValueError, match=r"one of 'dequantize', 'multiply', 'float', got 'int8'"):
        to_onnx(net, tmp_path / "net.onnx", x, weights="int8")


class Moved(nn.Module):
    """Its weights are reshaped, transposed and convolved with."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.bilinear = nn.Conv1d(1, 1, 4), nn.Linear(4, 1), nn.Bilinear(4, 4, 2)
        self.first = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        moved = self.conv.weight.reshape(4, 1) + self.linear.weight.t() + self.conv.weight.transpose(0, 2)[0]
        return self.bilinear(x, x) + x @ moved + self.conv(self.first(x.unsqueeze(1))).flatten(1)


def test_zero_points_where_weights_are_moved(tmp_path):
    """Runtimes that quantize again behind such operators have no unsigned integers to take by default."""
    torch.manual_seed(0)
    net = Moved()
    convert(net)
    x = torch.randn(2, 4)
    to_onnx(net, tmp_path / "net.onnx", x)
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), outputs(net, (x,)))
    model = onnx.load(tmp_path / "net.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    consumers = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, set()).add(node.op_type)
    dequantizing = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert {len(n.input) for n in dequantizing} == {2, 3}
    for node in dequantizing:
        if consumers[node.output[0]] & {"Reshape", "Transpose"}:
            codes, scales, zeros = (stored[name] for name in node.input)
            assert zeros.data_type == codes.data_type
            assert zeros.dims == scales.dims
            assert not onnx.numpy_helper.to_array(zeros).any()


class Branches(nn.Module):
    """Goes on in one way or another, with a weight in both."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.one(x)
        return torch.cond(y.sum() > 0, lambda y, w: y @ w, lambda y, w: y + w[0], (y, self.other.weight))


class LayersInBranches(Branches):
    """Takes one layer or the other."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))


@pytest.mark.parametrize("weights", ["dequantize", "multiply"])
def test_branches_of_a_graph(weights, tmp_path):
    """Weights that bodies read are written like others."""
    torch.manual_seed(0)
    net = Branches()
    convert(net)
    x = torch.randn(2, 4)
    report = to_onnx(net, tmp_path / "net.onnx", x, weights=weights)
    assert set(report.types.values()) == {"int8"}
    assert ("DequantizeLinear" in str(onnx.load(tmp_path / "net.onnx"))) == (weights == "dequantize")
    opened = session(tmp_path / "net.onnx")
    for given in (x, -x):
        assert_close(run(opened, (given,)), outputs(net, (given,)))


def test_layers_that_cannot_be_traced_with_codes(tmp_path):
    """The error names what can be done, and that works."""
    torch.manual_seed(0)
    net = LayersInBranches()
    convert(net)
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=r"cannot trace this LayersInBranches.*weights='float' helps"):
        to_onnx(net, tmp_path / "net.onnx", x)
    to_onnx(net, tmp_path / "net.onnx", x, weights="float")
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), outputs(net, (x,)))


def test_size(tmp_path):
    """The file of a network of the size of LeNet-5 has at most 1.2 bytes a weight."""
    net = LeNet5().net
    convert(net)
    report = to_onnx(net, tmp_path / "net.onnx", torch.randn(1, 1, 28, 28))
    assert set(report.types.values()) == {"int8"}
    assert report.nbytes <= 1.2 * size_report(net).total.weights


def test_weights_that_are_not_used(tmp_path):
    """What forward() does without is not written, and the report says so."""
    net = Named()
    net.other = nn.Linear(3, 3)
    convert(net)
    report = to_onnx(net, tmp_path / "net.onnx", {"x": torch.randn(2, 8), "y": torch.randn(2, 4)})
    assert report.types == {"layer.weight": "int8", "other.weight": "none"}
    assert str(report) == f"{report.nbytes:,} bytes: 1 weight in int8, 1 weight not used"
    assert not [t.name for t in onnx.load(tmp_path / "net.onnx").graph.initializer if "other" in t.name]


class Scaled(nn.Conv2d):
    """A layer with attributes of the names that codes and scales would have."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight_scale, self.weight_codes, self.weight_codes_ = nn.Parameter(torch.tensor(2.0)), 3, None

    def forward(self, x):
        return super().forward(x) * self.weight_scale


@pytest.mark.parametrize("name", ["resnet_basic", "grouped_transposed", "lstm_classifier"])
def test_codes_of_a_packed_file(name, tmp_path):
    """A network that load() has filled makes the file that the compressed one does."""
    net, inputs = shrunk(name)
    export(net, tmp_path / "net.scnn")
    plain = load(tmp_path / "net.scnn", into=ZOO[name].make()).eval()
    expected = to_onnx(net, tmp_path / "own.onnx", *inputs)
    found = to_onnx(plain, tmp_path / "file.onnx", *inputs, codes=tmp_path / "net.scnn")
    assert (tmp_path / "own.onnx").read_bytes() == (tmp_path / "file.onnx").read_bytes()
    assert found == expected


def test_codes_of_another_file(tmp_path):
    """Weights that are not the file's stay float, and a file of another network is refused."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(net)
    export(net, tmp_path / "net.scnn")
    plain = load(tmp_path / "net.scnn", into=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    plain[1].weight.data += 1
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"1\.weight: float, as .*net\.scnn has other values\."):
        report = to_onnx(plain, tmp_path / "net.onnx", x, codes=tmp_path / "net.scnn")
    assert report.types == {"0.weight": "int8"}
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), [plain(x).detach()])
    with pytest.warns(UserWarning, match="codes= names the packed file"):
        to_onnx(plain, tmp_path / "net.onnx", x)
    with pytest.raises(ValueError, match="Expected a packed file of this Linear, found none of its weights in"):
        to_onnx(plain[0], tmp_path / "never.onnx", x, codes=tmp_path / "net.scnn")
    (tmp_path / "net.scnn").write_bytes(b"SCNN")
    with pytest.raises(PackedFileError, match=r"net\.scnn: "):
        to_onnx(plain, tmp_path / "never.onnx", x, codes=tmp_path / "net.scnn")
    assert not (tmp_path / "never.onnx").exists()


def test_names_that_are_taken(tmp_path):
    net = nn.Sequential(Scaled(3, 4, 3), Scaled(4, 4, 3))
    convert(net)
    x = torch.randn(2, 3, 8, 8)
    for weights in ("dequantize", "multiply"):
        assert set(to_onnx(net, tmp_path / "net.onnx", x, weights=weights).types.values()) == {"int8"}
        assert_close(run(session(tmp_path / "net.onnx"), (x,)), [net(x).detach()])


def test_equal_weights_are_stored_once(tmp_path):
    """The report knows of both."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight.data.copy_(net[0].weight.data)
    convert(net)
    report = to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8))
    assert report.types == {"0.weight": "int8", "2.weight": "int8"}


def test_attributes(tmp_path):
    """Nodes say what differs from the operators' defaults, and no more."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3), nn.LeakyReLU(0.01), nn.LeakyReLU(0.2), nn.Softmax(1))
    convert(net)
    to_onnx(net, tmp_path / "net.onnx", IMAGES)
    nodes = [n for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type in {"Conv", "LeakyRelu", "Softmax"}]
    assert [sorted(a.name for a in n.attribute) for n in nodes] == [
        ["dilations", "group", "kernel_shape", "pads", "strides"],
        [],
        ["alpha"],
        ["axis"],
    ]
    assert_close(run(session(tmp_path / "net.onnx"), (IMAGES,)), outputs(net, (IMAGES,)))


def test_the_model_is_left_alone(tmp_path):
    """The network goes on as it was, and so do torch's settings."""
    net = conv_net().train()
    before, level = copy.deepcopy(net), logging.getLogger("torch.onnx").level
    to_onnx(net, tmp_path / "net.onnx", IMAGES)
    assert str(net) == str(before)
    assert net.training
    assert net.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(before.state_dict()[k], v) for k, v in net.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level
    assert torch.backends.mha.get_fastpath_enabled()


class Fixed(nn.Linear):
    """Has its batch size written into the code."""

    def forward(self, x):
        return super().forward(x).reshape(2, self.out_features)


def test_batch_sizes(tmp_path):
    """Traced with a single example a network takes any number; where its code fixes the number, that is told."""
    net = conv_net()
    to_onnx(net, tmp_path / "any.onnx", IMAGES[:1])
    assert session(tmp_path / "any.onnx").get_inputs()[0].shape == ["batch", 3, 8, 8]
    to_onnx(net, tmp_path / "one.onnx", IMAGES[:1], dynamic_batch=False)
    assert session(tmp_path / "one.onnx").get_inputs()[0].shape == [1, 3, 8, 8]
    net = Fixed(8, 4)
    convert(net)
    with pytest.warns(UserWarning, match="Dimension 0 of x is fixed"):
        to_onnx(net, tmp_path / "fixed.onnx", torch.randn(2, 8))


def test_sizes_that_the_tracer_has_written_down(tmp_path):
    """Where only the size traced would work, although the network takes others, the file says that and works."""
    net = nn.LSTM(3, 2)  # the first dimension is the length
    convert(net)
    x = torch.randn(4, 2, 3)
    with pytest.warns(UserWarning, match="Dimension 0 of input is fixed"):
        to_onnx(net, tmp_path / "net.onnx", x)
    opened = session(tmp_path / "net.onnx")
    assert opened.get_inputs()[0].shape == [4, 2, 3]
    with torch.no_grad():
        expected, (hidden, cell) = net(x)
    assert_close(run(opened, (x,)), [expected, hidden, cell])


def test_a_model_never_compressed(tmp_path):
    """It is written as it is, and says so."""
    net = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match="Nothing in this Linear is compressed"):
        report = to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8))
    assert report.types == {}
    assert "nothing compressed" in str(report)
    x = torch.randn(3, 8)
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), outputs(net, (x,)))


def test_nothing_half_written(tmp_path, monkeypatch):
    """A path that cannot be written raises, and an earlier file there stays whole."""
    net = nn.Linear(8, 4)
    convert(net)
    x = torch.randn(2, 8)
    with pytest.raises(OSError, match="nowhere"):
        to_onnx(net, tmp_path / "nowhere" / "net.onnx", x)
    (tmp_path / "net.onnx").write_bytes(b"earlier")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        to_onnx(net, tmp_path / "net.onnx", x)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == b"earlier"


class Named(nn.Module):
    """Takes a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, batch):
        return self.layer(batch["x"]) + batch["y"]


def test_a_dictionary(tmp_path):
    """The only or last input may be a dictionary, whose entries become inputs."""
    net = Named()
    convert(net)
    x, y = torch.randn(2, 8), torch.randn(2, 4)
    to_onnx(net, tmp_path / "net.onnx", {"x": x, "y": y})
    opened = session(tmp_path / "net.onnx")
    assert [i.name for i in opened.get_inputs()] == ["batch_x", "batch_y"]
    assert_close(run(opened, (x[:1], y[:1])), [net({"x": x[:1], "y": y[:1]}).detach()])


def test_inputs_are_tried_first(tmp_path):
    """A module without forward, and inputs that it does not take, are told before anything is traced."""
    net = nn.ModuleList([nn.Linear(8, 4)])
    convert(net)
    with pytest.raises(ValueError, match=r"Expected a ModuleList with a forward\(\)"):
        to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"inputs that Linear.forward\(\) takes, got \(2, 7\): RuntimeError: mat1"):
        to_onnx(net[0], tmp_path / "net.onnx", torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"got no tensors: TypeError"):
        to_onnx(net[0], tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_packages(missing, monkeypatch):
    """The error names what is missing and how to install it, before anything is traced."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing} is missing.*pip install onnx onnxscript"):
        to_onnx(nn.Linear(8, 4), "unused.onnx", torch.randn(2, 8))


class Calls(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.lin(x) + self.calls


def test_buffers_that_are_written(tmp_path):
    """What the network has counted while it was tried is forgotten."""
    net = Calls()
    convert(net)
    to_onnx(net.eval(), tmp_path / "net.onnx", torch.zeros(2, 4))
    assert net.calls == 0
    assert_close(run(session(tmp_path / "net.onnx"), (torch.zeros(2, 4),)), [net(torch.zeros(2, 4)).detach()])


class Rows(nn.Module):
    """Code that asks for the size of the batch, in one way or another."""

    def __init__(self, body):
        super().__init__()
        self.lin, self.body = nn.Linear(4, 3), body

    def forward(self, x):
        return self.body(self.lin, x)


@pytest.mark.parametrize(
    "body",
    [
        lambda lin, x: lin(x) - lin(x).mean(0) if x.shape[0] > 1 else lin(x),
        lambda lin, x: lin(x) * 2 if x.shape[0] > 1 else lin(x),
        lambda lin, x: sum(lin(row) for row in x),
    ],
)
def test_code_that_asks_for_the_size_of_the_batch(body, tmp_path):
    """The file is that of the example's size, and says so."""
    net, x = Rows(body).eval(), torch.randn(1, 4)
    convert(net)
    with pytest.warns(UserWarning, match="Dimension 0 of x is fixed at the size traced"):
        to_onnx(net, tmp_path / "net.onnx", x)
    assert_close(run(session(tmp_path / "net.onnx"), (x,)), [net(x).detach()])


class Many(nn.Module):
    """Takes any number of arguments, also none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(4, 3)

    def forward(self, *xs):
        return self.weight(sum(xs)) if xs else self.weight.bias * 2


@pytest.mark.filterwarnings("ignore:.*is fixed at the size traced")
@pytest.mark.parametrize("n", [0, 2])
def test_any_number_of_arguments(n, tmp_path):
    """They are written one by one; none is a number too."""
    net, xs = Many().eval(), [torch.randn(1, 4) for _ in range(n)]
    convert(net)
    to_onnx(net, tmp_path / "net.onnx", *xs)
    assert_close(run(session(tmp_path / "net.onnx"), xs), [net(*xs).detach()])


@pytest.mark.parametrize("opset", [-1, 17, 99, "21", None])
def test_opsets_that_are_not_there(opset, tmp_path):
    """An opset that cannot be written is refused, not replaced by another."""
    with pytest.raises(ValueError, match="Expected opset from 18 to"):
        to_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", torch.zeros(1, 2), opset=opset)


def test_inputs_are_left_alone(tmp_path):
    """A network that writes into its input is given another."""
    x = torch.ones(1, 4)
    net = Rows(lambda lin, x: lin(x.mul_(2))).eval()
    convert(net)
    to_onnx(net, tmp_path / "net.onnx", x)
    assert torch.equal(x, torch.ones(1, 4))
