"""Packed files: what is read is what was written, to the bit, by either reader, in as many bytes as reported."""

import ast
import re
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_networks import NETWORKS, large_codes, with_random_codes
from torch import nn

from lightning_selfcompress import convert
from lightning_selfcompress.files.export import export
from lightning_selfcompress.packing import Packed, from_bytes, packed_size, to_bytes, varint
from lightning_selfcompress.packing.bounds import at_bounds, bounds_of, put_bounds, to_symbols, to_tokens
from lightning_selfcompress.packing.content import from_rows, to_rows
from lightning_selfcompress.packing.levels import LEVELS, SHARES
from lightning_selfcompress.packing.tokens import extra_bits, join_tokens, tokens_of
from lightning_selfcompress.packing.writing import classes_of
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.formula import step_size
from lightning_selfcompress.quantize.parameters import quantized_parameters

READER = Path(format_reader.__file__)


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(3)
    return NETWORKS[request.param]()


def array(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def assert_same_bits(one, other):
    """Two arrays of one type and shape, bit for bit."""
    assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def assert_same(one, other):
    """The same content, but for the exponents of channels whose codes are all 0."""
    assert dict(one.attributes) == dict(other.attributes)
    assert [t.name for t in one.tensors] == [t.name for t in other.tensors]
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert (a.dtype, a.shape, a.storage) == (b.dtype, b.shape, b.storage)
        if a.codes is None:
            assert b.codes is None
            assert_same_bits(array(a.values), array(b.values))
        else:
            alive = a.codes.rows.any(1)
            assert a.codes.axis == b.codes.axis
            assert a.codes.same_as(b.codes)
            assert_same_bits(a.codes.rows, b.codes.rows)
            assert_same_bits(a.codes.exponents[alive], b.codes.exponents[alive])


def test_what_is_read_is_what_was_written(model):
    """Names, types, shapes, axes, codes, values and attributes come back."""
    packed = Packed.of(model)
    assert_same(from_bytes(to_bytes(packed)), packed)


def test_the_same_network_gives_the_same_bytes(model):
    """Written twice, or read and written again, it is the same file."""
    data = to_bytes(Packed.of(model))
    assert to_bytes(Packed.of(model)) == data
    assert to_bytes(from_bytes(data)) == data


def test_weights_are_those_of_the_model(model):
    """Dequantized codes are what the converted layer computes with, and everything else is as it was."""
    read = {t.name: t.tensor() for t in from_bytes(to_bytes(Packed.of(model))).tensors}
    for p in quantized_parameters(model):
        weight = getattr(p.layer, p.weight_name).detach()
        assert read[p.name].dtype == weight.dtype
        assert torch.equal(read.pop(p.name), weight)
    state = model.state_dict()
    for name, tensor in read.items():
        assert_same_bits(array(tensor), array(state[name].contiguous()))


def test_the_reported_size_is_that_of_the_file(model):
    """The parts add up to the file's length, and the layers to the codes and channels but for rounding and lanes."""
    packed = Packed.of(model)
    size = packed_size(packed)
    assert size.nbytes == len(to_bytes(packed))
    layers = len(packed.coded)
    assert size.codes.keys() == size.channels.keys() == {t.name for t in packed.coded}
    codes = sum(t.codes.rows.size for t in packed.coded)
    assert sum(size.codes.values()) == pytest.approx(size.code_nbytes, abs=8 + layers + 4 * codes / 2048)
    assert sum(size.channels.values()) == pytest.approx(size.channel_nbytes, abs=8 + layers)


def test_the_second_reader_reads_the_same(model):
    """Plain Python and NumPy, written from docs/format.md, give the same values bit for bit."""
    data = to_bytes(Packed.of(model))
    ours = from_bytes(data)
    tensors, attributes = format_reader.read(data)
    assert attributes == dict(ours.attributes)
    assert list(tensors) == [t.name for t in ours.tensors]
    for tensor in ours.tensors:
        assert_same_bits(tensors[tensor.name], array(tensor.tensor()))


def test_the_second_reader_is_short_and_on_its_own():
    """At most 230 lines, of NumPy and the standard library."""
    text = READER.read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(text.splitlines()) <= 230
    assert [name.name for node in imports for name in node.names] == ["math", "zlib", "numpy"]


def test_the_documented_steps_are_those_of_the_quantizer():
    """The sixteen numbers of docs/format.md, times powers of two, are the steps, in float64."""
    text = (READER.parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    pairs = re.findall(r"\| (\d+) \| (1\.\d+|1\.0) (?=\|)", text)
    table = {int(i): float(value) for i, value in pairs}
    assert sorted(table) == list(range(16))
    e = np.arange(-2048, 2048)
    documented = np.ldexp(np.array([table[i % 16] for i in e]), e // 16)
    assert step_size(torch.from_numpy(e).double() / 16).tolist() == documented.tolist()


def test_tables_take_less_than_they_gain():
    """Channels of different spreads are smaller than the order-0 entropy of their codes."""
    model = with_random_codes(nn.Linear(400, 120))
    (tensor,) = Packed.of(model).coded
    counts = np.unique(tensor.codes.rows, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert packed_size(Packed.of(model)).code_nbytes < entropy


def test_clipped_channels_take_a_bit_for_a_weight():
    """Where nearly all weights are at an end of their clip range, however wide that is in each channel."""
    torch.manual_seed(0)
    layer = nn.Linear(1000, 60)
    convert(layer)
    with torch.no_grad():
        layer.bit_depth.copy_(torch.linspace(1.5, 10, 60))
        layer.exponent.copy_(-layer.bit_depth - 6)
        nn.init.normal_(layer._parameters["weight"])
    size = packed_size(Packed.of(layer))
    assert 1.0 <= 8 * size.code_nbytes / 60_000 < 1.15


def test_bounds():
    """A bound is that of all codes, if many lie at its ends; codes of -1 and 0, few, and very large ones have none."""
    rows = [
        [-3, 2] * 30,
        [2] * 60,
        [-3] * 60,
        [-3, 2, 0] * 20,
        [-3, 0, 0, 0, 1, 2] * 10,
        [-1, 0] * 30,
        [-4096, 4095] * 30,
    ]
    assert bounds_of(np.array(rows)).tolist() == [3, 3, 3, 3, 0, 0, 0]
    assert bounds_of(np.array([[-4095, 4094], [127, 5]]).repeat(30, 1)).tolist() == [4095, 128]
    assert bounds_of(np.array([[-3, 2] * 7])).tolist() == [0]
    assert bounds_of(np.zeros((3, 0), np.int8)).tolist() == [0, 0, 0]


@given(
    st.lists(st.lists(st.sampled_from([-130, -128, 127, -3, -2, 0, 1, 2, 3, 9]), min_size=40, max_size=40), max_size=6)
)
def test_symbols_of_bounds(rows):
    """Symbols and bounds give the codes back."""
    codes = np.array(rows, np.int16).reshape(-1, 40)
    bounds = bounds_of(codes)
    columns = codes.T
    tokens = tokens_of(columns.reshape(-1)).reshape(columns.shape)
    symbols = to_symbols(tokens, columns, bounds)
    within = np.where(at_bounds(codes, bounds).T, 0, columns)
    back = to_tokens(symbols, bounds)
    assert (back == tokens_of(within.reshape(-1)).reshape(columns.shape)).all()
    joined = join_tokens(back.reshape(-1), extra_bits(within.reshape(-1))).reshape(columns.shape)
    found = put_bounds(joined, symbols, bounds)
    assert (found == columns).all()
    assert found.dtype == (np.int8 if np.abs(codes).max(initial=0) < 128 else np.int16)


def test_a_dead_layer_takes_next_to_nothing():
    """Codes that are all 0 are not stored."""
    alive, dead = with_random_codes(nn.Linear(400, 100, bias=False)), nn.Linear(4000, 100, bias=False)
    before = len(to_bytes(Packed.of(nn.ModuleList([alive]))))
    with torch.no_grad():
        with_random_codes(dead).bit_depth.fill_(0)
    assert len(to_bytes(Packed.of(nn.ModuleList([alive, dead])))) < before + 50


def test_half_values_are_rounded_on_request_only():
    """float32 values lie in float16 if that is exact, or wanted and within a thousandth."""
    model = nn.Linear(3, 4)
    exact, rounded = (from_bytes(to_bytes(Packed.of(model, half=half))).tensors[0] for half in (False, True))
    assert torch.equal(exact.tensor(), model.weight)
    assert torch.equal(rounded.tensor(), model.weight.half().float())
    with torch.no_grad():
        model.weight[0, 0] = 1e-7
    assert torch.equal(Packed.of(model, half=True).tensors[0].tensor(), model.weight)


def weights_that_are_nan(model):
    model.latent("weight")[0, 0] = float("nan")


def steps_far_too_small(model):
    model.bit_depth.fill_(40)
    model.exponent.fill_(-100)


@pytest.mark.parametrize("spoil", [weights_that_are_nan, steps_far_too_small])
def test_codes_have_to_be_numbers_of_31_bits(spoil):
    """A layer that has no such codes is still measured while it trains, but not written; the message names it."""
    model = with_random_codes(nn.Linear(3, 4))
    with torch.no_grad():
        spoil(model)
    assert packed_size(Packed.of(model)).nbytes > 0
    with pytest.raises(ValueError, match="'weight'"):
        export(model, "unused.scnn")


def with_buffer(tensor, name="x"):
    model = nn.Module()
    model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_buffer(torch.zeros(2, dtype=torch.float8_e4m3fn)), "'x' of one of the types float32, .*float8"),
        (with_buffer(torch.zeros([1] * 17)), "'x' of at most 16 dimensions, got 17"),
        (with_buffer(torch.zeros(1), "x" * 1025), "names of at most 1024 bytes"),
    ],
)
def test_what_the_format_has_no_room_for_is_named(model, message):
    """Unknown types, many dimensions and long names are errors when writing."""
    with pytest.raises(ValueError, match=message):
        to_bytes(Packed.of(model))


def test_wide_codes_take_extra_bits_only_where_they_are():
    """24-bit codes cost what they have to."""
    packed = Packed.of(large_codes())
    bits = sum(int(np.ceil(np.log2(np.abs(t.codes.rows.astype(float)) + 1) + 1).sum()) for t in packed.coded)
    assert packed_size(packed).code_nbytes <= 1.2 * bits / 8


@given(st.integers(0, 1 << 40))
def test_varints(number):
    """A number takes a byte for every seven bits, and zigzag takes either sign."""
    data = varint.write(number)
    assert len(data) == max(1, -(-number.bit_length() // 7))
    assert sum((byte & 127) << 7 * i for i, byte in enumerate(data)) == number
    assert [byte >> 7 for byte in data] == [1] * (len(data) - 1) + [0]
    assert varint.from_zigzag(varint.zigzag(number)) == number
    assert varint.from_zigzag(varint.zigzag(-number)) == -number
    assert varint.zigzag(varint.from_zigzag(number)) == number


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_rows_of_channels(shape, data):
    """A row holds what belongs to a channel, and rows make up the weight again."""
    groups = data.draw(st.sampled_from([1, 2, 3])) if len(shape) > 1 else 1
    shape = [groups * shape[0], *shape[1:]]
    axis = ChannelAxis(data.draw(st.integers(min(groups - 1, 1), len(shape) - 1)), groups)
    weight = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    rows = to_rows(weight, axis)
    assert rows.shape[0] == axis.channels(weight)
    assert torch.equal(from_rows(rows, axis, shape), weight)
    low, high = axis.extremes(weight)
    assert torch.equal(low, rows.amin(1))
    assert torch.equal(high, rows.amax(1))


@given(st.lists(st.integers(0, 1 << 20), max_size=100), st.integers(1, 5))
def test_classes(scales, row):
    """Channels of one class have means within an octave, 0 is for zeros, and the first class has a channel."""
    codes = np.array(scales, np.int32)[:, None] * np.array([1, -1, 0, 1, 2])[:row]
    classes = classes_of(codes, np.zeros(len(codes), np.int64))
    mean = np.abs(codes).mean(1)
    assert ((classes == 0) == (mean == 0)).all()
    assert classes.max(initial=0) <= 0 or (classes == 1).any()
    assert classes.max(initial=0) <= LEVELS + SHARES
    for c in set(classes[classes > 0].tolist()):
        assert mean[classes == c].max() <= 2**0.51 * mean[classes == c].min()


def test_classes_of_bounds():
    """Channels that have a bound are apart from others, and in a class by how many of their codes are not at it."""
    within = [0, 0, 1, 2, 16, 18]
    rows = [([-k, k - 1] * 32)[: 64 - n] + [0] * n for n, k in zip(within, (3, 9, 2, 7, 5, 5), strict=True)]
    codes = np.array([*rows, [1, 0, 0, 0] * 16, [0] * 64])
    bounds = bounds_of(codes)
    assert bounds.tolist() == [3, 9, 2, 7, 5, 5, 0, 0]
    classes = classes_of(codes, bounds).tolist()
    assert classes == [2, 2, 3, 4, 6, 6, 1, 0]
