"""Modules that quantize activations: the same objects, the same keys, whatever is done with them."""

import copy
import pickle

import pytest
import torch
from networks import small_net
from torch import nn

from lightning_selfcompress import calibrate_activations, convert, export, finalize, load, size_report
from lightning_selfcompress.activations.layers import (
    Activated,
    Point,
    activated_modules,
    activations_off,
    exponents_of,
    put_points,
    remove_activations,
    set_points,
)


def images(n=8):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(bits=8, converted=True):
    torch.manual_seed(0)
    net = small_net()
    if converted:
        convert(net)
    return calibrate_activations(net, [images()], bits=bits).eval()


def encoder(activation="relu"):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation=activation, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()
    return net, torch.randn(8, 5, 4)


@pytest.mark.parametrize("converted", [True, False])
def test_the_module_stays_the_same_object(converted):
    """Parameters are the same objects in the same order, and the float network's keys stay."""
    torch.manual_seed(0)
    net = small_net()
    if converted:
        convert(net)
    parts, parameters, keys = list(net), list(net.parameters()), list(net.state_dict())
    calibrate_activations(net, [images()])
    assert all(a is b for a, b in zip(net, parts, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    added = ["0.activation_input", "3.activation_output", "5.activation_output"]
    assert [k for k in net.state_dict() if k not in keys] == added


@pytest.mark.parametrize("converted", [True, False])
def test_removing_gives_the_classes_back(converted):
    """Without its points a network is what it was."""
    torch.manual_seed(0)
    net = small_net().eval()
    if converted:
        convert(net)
    classes, keys, before = [type(m) for m in net.modules()], list(net.state_dict()), net(images())
    calibrate_activations(net, [images()])
    assert not torch.equal(net(images()), before)
    remove_activations(net)
    assert [type(m) for m in net.modules()] == classes
    assert list(net.state_dict()) == keys
    assert torch.equal(net(images()), before)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), finalize],
    ids=["deepcopy", "pickle", "plain"],
)
def test_copies_compute_alike(copied):
    """A copy, a pickled and a plain network quantize activations as the network does, to the bit."""
    net = network()
    other = copied(net).eval()
    assert [m._points for _, m in activated_modules(other)] == [m._points for _, m in activated_modules(net)]
    assert torch.equal(other(images()), net(images()))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_packed_file_holds_the_points(bits, tmp_path):
    """A network loaded from a file computes the same to the bit, and the reported bytes are the file's."""
    net = network(bits)
    export(net, tmp_path / "net")
    again = load(tmp_path / "net", into=small_net()).eval()
    assert torch.equal(again(images()), net(images()))
    assert (tmp_path / "net").stat().st_size == size_report(net).nbytes


def test_a_point_takes_few_bytes(tmp_path):
    """The points of a network make its file larger by at most 32 bytes each, most of which are names."""
    net = network()
    with_points = size_report(net).nbytes
    count = sum(1 for _ in activated_modules(net))
    assert 0 < with_points - size_report(remove_activations(net)).nbytes <= 32 * count


def test_the_report_tells_of_activations():
    """A line of the report counts activations by their bits; a float network has none."""
    report = size_report(network(5))
    assert report.activation_bits == (5, 5, 5)
    assert str(report).splitlines()[-1] == "3 activations in 5 bits, one step size each"
    assert "activation" not in str(size_report(small_net()))


@pytest.mark.parametrize("number", [0, 12_345])
def test_points_as_numbers(number):
    """What a file holds is read as the point and the exponent that were written."""
    for signed in (True, False):
        point, exponent = Point("input", signed, 7), -3.0625 + number
        exponent = max(-128.0, min(exponent, 127.9375))
        assert Point.from_number("input", point.to_number(exponent)) == (point, exponent)


def test_casts_keep_the_exponents():
    """A cast or a move keeps the leaf that an optimizer holds, in a dtype of at least 32 bits."""
    net = network()
    exponents = exponents_of(net[3]).requires_grad_()
    for cast, dtype in ((net.double, torch.float64), (net.bfloat16, torch.float32)):
        cast()
        assert exponents_of(net[3]) is exponents
        assert (exponents.is_leaf, exponents.requires_grad, exponents.dtype) == (True, True, dtype)
    assert net(images().bfloat16()).dtype == torch.bfloat16


def test_exponents_lie_with_the_activations():
    """Exponents of modules without tensors are on the device, and in the dtype, of what is before them."""
    net = small_net().double().to("meta")
    points = {path: [(Point("output", True, 8), -3.0)] for path in ("0", "2", "3", "5")}
    put_points(net, points)
    found = [exponents_of(part) for _, part in activated_modules(net)]
    assert [(e.device.type, e.dtype) for e in found] == [("meta", torch.float64)] * 4


def test_a_state_dict_is_loaded():
    """Exponents are loaded by name; a key without a point is unexpected."""
    net, other = network(), network()
    with torch.no_grad():
        exponents_of(net[3]).sub_(2.0)
    assert not torch.equal(net(images()), other(images()))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images()), other(images()))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*3\.activation_output"):
        remove_activations(other).load_state_dict(net.state_dict())


def test_other_values_pass():
    """A module whose input is no float tensor passes it on as it is."""
    flatten = nn.Flatten(0)
    set_points(flatten, [Point("input", True, 8), Point("output", True, 8)], [-3.0, -3.0])
    assert isinstance(flatten, Activated)
    assert torch.equal(flatten(torch.arange(6).view(2, 3)), torch.arange(6))


def test_an_input_by_name():
    """The first argument is quantized where it is given by its name as well."""
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    set_points(layer, [Point("input", True, 4)], [-1.0])
    assert torch.equal(layer(input=x), layer(x))
    with activations_off():
        assert not torch.equal(
            layer(x), layer.weight.new_tensor(0) + nn.functional.linear(x * 0, layer.weight, layer.bias)
        )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_quantizes_in_evaluation(activation):
    """Without gradients torch computes an encoder layer in one operation; with quantizers it calls the modules."""
    net, x = encoder(activation)
    calibrate_activations(net, [x])
    inside = [path for path, _ in activated_modules(net) if path.startswith("1.layers.")]
    assert inside
    with torch.no_grad():
        evaluated = net(x)
        masked = net[1](net[0](x), src_key_padding_mask=torch.arange(5) >= torch.full((8, 1), 3))
    torch.testing.assert_close(evaluated, net(x), rtol=1e-5, atol=1e-6)
    with activations_off(), torch.no_grad():
        assert not torch.allclose(evaluated, net(x), rtol=1e-5, atol=1e-6)
    assert masked.shape == (8, 5, 16)


@pytest.mark.parametrize(("activation", "fast"), [("relu", 1), ("gelu", 2), (torch.tanh, 0)])
def test_an_encoder_is_fast_again(activation, fast):
    """Once its activations are in float again, an encoder layer may be one operation as before."""
    net, x = encoder(activation)
    layer = net[1].layers[0]
    assert layer.activation_relu_or_gelu == fast
    calibrate_activations(net, [x])
    assert layer.activation_relu_or_gelu == 0
    remove_activations(net)
    assert layer.activation_relu_or_gelu == fast


def test_a_compiled_network_is_one_graph():
    """Compiled without a break, a converted network with quantized activations computes and learns as in eager mode."""
    net = network().train()
    for _, part in activated_modules(net):
        exponents_of(part).requires_grad_()
    other = copy.deepcopy(net)
    outputs = torch.compile(net, backend="aot_eager", fullgraph=True)(images()), other(images())
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for (_, one), (_, two) in zip(activated_modules(net), activated_modules(other), strict=True):
        torch.testing.assert_close(exponents_of(one).grad, exponents_of(two).grad)


def test_exported_and_transformed_networks():
    """torch.export, functional_call and vmap see the quantizers."""
    net = network()
    x, expected = images(), network()(images())
    assert torch.equal(torch.export.export(net, (x,)).module()(x), expected)
    assert torch.equal(torch.func.functional_call(net, dict(net.named_parameters()), (x,)), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: net(image[None])[0])(x), expected)
