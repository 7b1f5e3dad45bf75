"""Sizes: the differentiable one in bits, the reported one in whole bytes."""

import pytest
import torch
from depths import mixed_net, with_depths
from hypothesis import given
from hypothesis import strategies as st
from layer_kinds import KINDS
from networks import trained_tensors
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress.packing import Packed, packed_size, to_bytes
from lightning_selfcompress.packing.content import as_it_is
from lightning_selfcompress.packing.writing import value_bytes
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.formula import Range, bit_depth, quantize
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.price import ModelSize, size_bits
from lightning_selfcompress.size.report import layer_sizes, size_report, whole_bits

STATE = 4  # of the one lane that a small stream has: up to 2 bytes hold codes, and 2 hold values in float if there are


def state_nbytes(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def stored_nbytes(tensors):
    """Bytes of tensors that are not coded, each in the narrowest storage that holds it."""
    return sum(len(value_bytes(as_it_is("a name", t.detach()))) for t in tensors)


def coded_nbytes(report):
    """What a report leaves for codes and scales."""
    return report.nbytes - report.bias_nbytes - report.other_nbytes - report.structure_nbytes


def report_of_file(model):
    """The report, whose bytes have to be those of the packed file, each accounted for once."""
    report = size_report(model)
    assert report.nbytes == len(to_bytes(Packed.of(model)))
    rounding = len(report.layers)  # layers are rounded to whole bytes
    unaccounted = coded_nbytes(report) - report.total.code_nbytes - report.total.scale_nbytes
    assert -rounding <= unaccounted <= (STATE if report.layers else 0) + rounding
    return report


def set_weight(layer, weight, depths, exponents):
    with torch.no_grad():
        layer.latent("weight").copy_(torch.tensor(weight))
        layer.bit_depth.copy_(torch.tensor(depths))
        layer.exponent.copy_(torch.tensor(exponents))


@given(st.lists(st.tuples(st.floats(0, 16), st.integers(1, 1000)), min_size=1, max_size=20))
def test_size_bits(channels):
    """The size is the sum over all channels of their weights times their bits; its slope is their weights."""
    b, n = (torch.tensor(column, dtype=torch.float64) for column in zip(*channels, strict=True))
    b.requires_grad_()
    size = size_bits(b, n)
    size.backward()
    assert size.item() == pytest.approx(sum(bits * count for bits, count in channels), rel=1e-12)
    assert torch.equal(b.grad, n)


class TestModelSize:
    """Q of a model."""

    def test_is_bits_per_original_weight(self):
        """Q is the mean bit depth over all weights, each dead channel's counting 0."""
        net = with_depths(mixed_net())
        bits = weights = 0
        for p in quantized_parameters(net):
            per_weight = p.spec.axis.expand(bit_depth(p.raw_depth), p.spec.axis.split(p.latent))
            bits += float(per_weight.expand_as(p.spec.axis.split(p.latent)).detach().double().sum())
            weights += p.latent.numel()
        size = ModelSize.of(net)
        assert size.original_numel == weights
        assert size.bits_per_weight().item() == pytest.approx(bits / weights, rel=1e-6)

    @pytest.mark.parametrize("factor", [1.0, -0.3, 128.0])
    def test_gradients_are_those_of_q(self, factor):
        """The gradients are the factor times what autograd derives from Q, 0 for dead channels, and touch no .grad."""
        size = ModelSize.of(with_depths(mixed_net()))
        raw = [p.raw_depth for p in size.parameters]
        expected = torch.autograd.grad(factor * size.bits_per_weight(), raw)
        with torch.no_grad():
            actual = size.gradients(factor)
        assert_close(actual, expected, rtol=1e-6, atol=0)
        assert all(torch.equal(g == 0, p <= 0) for g, p in zip(actual, raw, strict=True))
        assert all(p.grad is None for p in raw)

    def test_shares_add_up(self):
        """However the weights are dealt out, the shares in Q and their gradients are those of the whole."""
        size = ModelSize.of(with_depths(mixed_net()))
        shares = [size.part(size.parameters[i::3]) for i in range(3)]
        total = sum(share.bits_per_weight() for share in shares)
        assert_close(total, size.bits_per_weight())
        expected = {id(p.latent): g for p, g in zip(size.parameters, size.gradients(1.0), strict=True)}
        for share in shares:
            for p, gradient in zip(share.parameters, share.gradients(1.0), strict=True):
                assert torch.equal(gradient, expected[id(p.latent)])

    def test_of_nothing(self):
        """A model, or a share, without quantized weights has Q = 0."""
        assert ModelSize.of(nn.Linear(3, 4)).bits_per_weight().item() == 0
        nothing = ModelSize.of(with_depths(nn.Linear(3, 4))).part([])
        assert (nothing.parameters, nothing.bits_per_weight().item()) == ((), 0)

    def test_tied_weights_count_once(self):
        """A weight used by two layers is in Q once."""
        net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
        net["head"].weight = net["embed"].weight
        size = ModelSize.of(with_depths(net))
        assert (len(size.parameters), size.original_numel) == (1, 40)

    def test_follows_the_depths(self):
        """A size made once reads the depths of now, also after a cast to another dtype."""
        layer = nn.Linear(3, 4)
        convert(layer)
        size = ModelSize.of(layer)
        with torch.no_grad():
            layer.bit_depth.copy_(torch.tensor([2.0, 0.0, -3.0, 4.0]))
        assert size.bits_per_weight().item() == 1.5
        layer.double()
        assert size.bits_per_weight().item() == 1.5
        assert size.gradients(4.0)[0].tolist() == [1.0, 0.0, 0.0, 1.0]


def codes_by_hand(p):
    """All codes of each channel, as sets of whole numbers, from the weights that the layer shows."""
    split = p.spec.axis.split(p.latent.detach().double())
    depth = p.spec.axis.expand(bit_depth(p.raw_depth.detach().double()), split)
    exponent = p.spec.axis.expand(p.exponent.detach().double(), split)
    found = quantize(split, Range.of(depth, exponent)) * torch.exp2(-exponent)
    channel = p.spec.axis.expand(torch.arange(p.channels), split).expand_as(split)
    return [{round(code) for code in found[channel == i].tolist()} for i in range(p.channels)]


def bits_by_hand(codes):
    """The width of the smallest two's complement integers that hold all codes; none for zeros."""
    return next(n for n in range(64) if all(-(2**n) <= 2 * code < 2**n or code == n == 0 for code in codes))


@pytest.mark.parametrize("name", KINDS)
def test_whole_bits_by_brute_force(name):
    """The whole bits of a channel are those of the smallest integers that hold all of its codes."""
    for _ in range(5):
        parameters = list(quantized_parameters(with_depths(KINDS[name].make().double())))
        for p, bits in zip(parameters, whole_bits(parameters), strict=True):
            assert bits.tolist() == [bits_by_hand(codes) for codes in codes_by_hand(p)]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([0, 0], 0), ([-1, 0], 1), ([0, 1], 2), ([-2, 1], 2), ([2, 0], 3), ([-4, 3], 3), ([-5, 0], 4), ([127, -128], 8)],
)
def test_whole_bits(codes, bits):
    """[-2, 1] fits two bits, [0, 2] needs three; a channel of zeros needs none."""
    layer = nn.Linear(2, 1)
    convert(layer)
    set_weight(layer, [[float(code) for code in codes]], [10.0], [0.0])
    assert whole_bits([next(quantized_parameters(layer))])[0].tolist() == [bits]


def hand_made():
    """Two layers whose codes are known: [[2, -4, 1], [0, 0, 0]] and [[0, 0], [1, -3]]; N = 10."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    convert(net)
    set_weight(net[0], [[0.5, -1.0, 0.25], [0.0, 0.0, 0.01]], [4.0, 3.0], [-2.0, -2.0])
    set_weight(net[2], [[5.0, 6.0], [1.4, -3.0]], [-1.0, 2.5], [0.0, 0.0])
    return net


class TestReport:
    """size_report, in numbers."""

    def test_a_network_by_hand(self):
        """Bits, bytes, weights and channels of a small network are what one counts by hand."""
        report = report_of_file(hand_made())
        first, second = report.layers
        assert (first.name, second.name) == ("0", "2")
        # codes 2, -4, 1 need 3 bits; the second channel is alive but all its codes are 0
        assert (first.channels, first.channels_before, first.weights, first.weights_before) == (2, 2, 6, 6)
        assert (first.learned_bits, first.max_bits, first.mean_bits) == (21.0, 4.0, 3.5)
        assert (first.code_bits, first.whole_bits) == (9, 1.5)
        # tokens 3, 8, 1 of 0 to 8, with counts that grow by 3: log2(9 * 12 * 15) bits of codes;
        # classes 1, 0: log2(2 * 5) bits, and exponents all alike
        assert (first.code_nbytes, first.scale_nbytes) == (round(10.7 / 8), round(3.3 / 8))
        # the first channel is dead; codes 1, -3 need 3 bits
        assert (second.channels, second.channels_before, second.weights, second.weights_before) == (1, 2, 2, 4)
        assert (second.learned_bits, second.max_bits, second.mean_bits) == (5.0, 2.5, 1.25)
        assert (second.code_bits, second.whole_bits) == (6, 1.5)
        assert (second.code_nbytes, second.scale_nbytes) == (round(6.1 / 8), round(3.3 / 8))  # tokens 1, 6 of 0 to 6
        assert report.bias_nbytes == 8
        assert report.other_nbytes == 4 * 3 + 1  # BatchNorm: four vectors of a scale and two ones or zeros, its counter
        assert report.float_nbytes == 24 + 8 + 40 + 16
        assert (report.bits_per_weight, report.channels) == (2.6, 3)

    def test_total_adds_up(self):
        """The total is the sum of its layers in every column but the largest depth."""
        report = report_of_file(with_depths(mixed_net()))
        total = report.total
        for column in (
            "weights_before",
            "weights",
            "channels_before",
            "channels",
            "code_bits",
            "code_nbytes",
            "scale_nbytes",
        ):
            assert getattr(total, column) == sum(getattr(layer, column) for layer in report.layers), column
        assert total.learned_bits == pytest.approx(sum(layer.learned_bits for layer in report.layers), rel=1e-12)
        assert total.max_bits == max(layer.max_bits for layer in report.layers)

    @pytest.mark.parametrize("name", KINDS)
    def test_is_the_file(self, name):
        """Of every kind of layer the bytes reported are those of the file, and its parts add up to them."""
        layer = with_depths(KINDS[name].make())
        report = report_of_file(layer)
        weights = {id(p.latent) for p in quantized_parameters(layer)}
        learned = {id(t) for p in quantized_parameters(layer) for t in (p.raw_depth, p.exponent)}
        left = [t for t in layer.parameters() if id(t) not in weights | learned]
        assert report.bias_nbytes + report.other_nbytes == stored_nbytes(left)

    def test_estimate(self):
        """An estimate has the learned figures of the exact report, and its bytes within 2%."""
        net = with_depths(nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40), nn.Linear(40, 500)), low=0.0)
        exact, estimate = size_report(net), size_report(net, exact=False)
        assert estimate.nbytes == pytest.approx(exact.nbytes, rel=0.02)
        assert coded_nbytes(estimate) == pytest.approx(coded_nbytes(exact), rel=0.02)
        for column in ("bits_per_weight", "channels", "weights_left", "float_nbytes", "bias_nbytes", "other_nbytes"):
            assert getattr(estimate, column) == getattr(exact, column), column

    def test_agrees_with_q(self):
        """The reported bits per weight are Q."""
        net = with_depths(mixed_net())
        assert size_report(net).bits_per_weight == pytest.approx(ModelSize.of(net).bits_per_weight().item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_of_a_float_model(self, dtype):
        """In a model that was not converted all values are left in float; conversion does not change its float size."""
        net = mixed_net().to(dtype)
        net.register_buffer("cache", torch.zeros(1000), persistent=False)
        nbytes = state_nbytes(net)
        before = report_of_file(net)
        assert (before.float_nbytes, before.layers, before.bias_nbytes) == (nbytes, (), 0)
        assert before.other_nbytes == stored_nbytes(net.state_dict().values())
        assert coded_nbytes(before) == 0
        assert (before.bits_per_weight, before.channels) == (0, 0)
        convert(net)
        assert size_report(net).float_nbytes == nbytes

    @pytest.mark.parametrize(
        ("name", "layers"),
        [
            ("LSTM", [f"weight_{n}_l{i}{r}" for i in "01" for r in ("", "_reverse") for n in ("ih", "hh", "hr")]),
            ("MultiheadAttention", ["in_proj_weight", "out_proj"]),
            ("MultiheadAttention, kdim", ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]),
        ],
    )
    def test_of_layers_with_several_weights(self, name, layers):
        """Each weight of a recurrent or attention layer has a line of its own; all that is left are its biases."""
        layer = KINDS[name].make()
        biases = stored_nbytes([t for key, t in layer.state_dict().items() if "bias" in key])
        weights = sum(t.numel() for key, t in layer.state_dict().items() if "weight" in key)
        convert(layer)
        report = report_of_file(layer)
        assert sorted(entry.name for entry in report.layers) == sorted(layers)
        assert (report.bias_nbytes, report.other_nbytes, report.total.weights) == (biases, 0, weights)

    def test_tied_weights_count_once(self):
        """Tied weights have one line and are paid for once, now and in float."""
        net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
        net["head"].weight = net["embed"].weight
        before = report_of_file(net)
        convert(net)
        report = report_of_file(net)
        assert before.other_nbytes == before.float_nbytes == report.float_nbytes == 4 * 40 + 4 * 10
        assert [layer.name for layer in report.layers] == ["embed"]
        assert (report.total.weights, report.bias_nbytes, report.other_nbytes) == (40, 4 * 10, 0)
        assert [tensor.name for tensor in Packed.of(net).tensors] == ["embed.weight", "head.bias"]

    def test_a_dead_network(self):
        """Where every channel is dead, no codes or scales are left: biases, the structure, and no more."""
        net = with_depths(nn.Sequential(nn.Linear(3, 4)), low=-2.0, high=0.0)
        report = report_of_file(net)
        assert (report.bits_per_weight, report.channels, report.total.weights, report.total.code_nbytes) == (0, 0, 0, 0)
        assert (coded_nbytes(report), report.total.scale_nbytes, report.bias_nbytes) == (STATE - 2, 0, 16)

    def test_measuring_changes_nothing(self):
        """A report reads the model: no parameter, gradient or mode changes, and no gradient is recorded."""
        net = with_depths(mixed_net())
        before = [(p, p._version, p.grad) for p in trained_tensors(net).values()]
        size_report(net)
        ModelSize.of(net).bits_per_weight()
        assert all(
            p is q and p._version == v and p.grad is g
            for (p, v, g), q in zip(before, trained_tensors(net).values(), strict=True)
        )

    def test_of_one_layer(self):
        """All layers are measured at once as each is on its own, whatever their dtypes."""
        net = with_depths(mixed_net())
        net["rnn"].double()
        packed, size = packed_size(Packed.of(net)), ModelSize.of(net)
        one_by_one = [
            layer_sizes([p], [bits], packed) for p, bits in zip(size.parameters, size.layer_bits(), strict=True)
        ]
        assert tuple(layer for (layer,) in one_by_one) == size_report(net).layers

    @pytest.mark.parametrize("exact", [True, False])
    def test_of_empty_weights(self, exact):
        """A weight without inputs, or without channels, has no bits and no bytes."""
        net = with_depths(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), low=1.0)
        for layer, kept in ((net[0], (4, 0)), (net[1], (0, 4))):
            layer._parameters["weight"] = nn.Parameter(torch.empty(kept))
            for name in ("bit_depth", "exponent"):
                layer._buffers[name] = getattr(layer, name).detach()[: kept[0]].clone()
        layers = size_report(net, exact=exact).layers
        assert [(layer.channels, layer.weights) for layer in layers] == [(4, 0), (0, 0), (2, 6)]
        assert [(layer.code_bits, layer.code_nbytes, layer.scale_nbytes) for layer in layers[:2]] == [(0, 0, 0)] * 2
        assert layers[2].code_bits > 0


class TestTable:
    """The report as text."""

    def test_has_a_line_for_each_layer_and_a_total(self):
        """Printed, a report is a table of equal columns: head, layers, total, and two sentences with the sums."""
        report = size_report(hand_made())
        assert str(report).splitlines() == [
            "layer  channels  of  weights  of  learned bits  max learned  whole bits  code B  scale B",
            "----------------------------------------------------------------------------------------",
            "0             2   2        6   6          3.50         4.00        1.50       1        0",
            "2             1   2        2   4          1.25         2.50        1.50       1        0",
            "----------------------------------------------------------------------------------------",
            "total         3   4        8  10          2.60         4.00        1.50       2        0",
            "",
            "codes and scales 4 + biases 8 + everything left in float 13 + names and shapes 41 = 66 bytes",
            "the float network: 88 bytes; now 75.0% of float",
        ]

    def test_says_that_nothing_is_converted(self):
        """Of a float network the report says that nothing is compressed, as inspect does of its checkpoint."""
        assert str(size_report(nn.Linear(2, 3))).splitlines() == [
            "Nothing in it is compressed.",
            "",
            "codes and scales 0 + biases 0 + everything left in float 36 + names and shapes 31 = 67 bytes",
            "the float network: 36 bytes; now 186.1% of float",
        ]

    def test_sums_agree(self):
        """The numbers of the printed sum add up, with thousands separators, to the report's bytes."""
        report = size_report(with_depths(nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40), nn.Linear(40, 2000))))
        lines = str(report).splitlines()
        words = lines[-2].replace(",", "").split()
        numbers = [int(word) for word in words if word.isdigit()]
        assert sum(numbers[:-1]) == numbers[-1] == report.nbytes
        assert numbers[-1] > 10_000
        columns = list(zip(*(line.replace(",", "").split() for line in (*lines[2:4], lines[5])), strict=True))
        for i in (1, 2, 3, 4, 8, 9):
            assert int(columns[i][0]) + int(columns[i][1]) == int(columns[i][2])

    def test_of_an_empty_model(self):
        """A model without parameters has a table of zeros."""
        report = report_of_file(nn.ReLU())
        # magic, version, a number of tensors that is 0, checksum; without a coded tensor there is no stream
        assert report.structure_nbytes == report.nbytes == 4 + 1 + 1 + 4
        assert str(report).splitlines()[-1] == "the float network: 0 bytes"
