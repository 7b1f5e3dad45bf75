"""The estimate of a packed file's size: of all layers at once, as of each layer alone."""

import math

import numpy as np
import pytest
import torch
from depths import mixed_net, with_depths
from hypothesis import given
from hypothesis import strategies as st
from layer_kinds import KINDS
from torch import nn

from lightning_selfcompress.packing import Packed, estimate
from lightning_selfcompress.packing.bounds import at_bounds, bounds_of
from lightning_selfcompress.packing.content import to_rows
from lightning_selfcompress.packing.estimate import estimated_size, table_bits
from lightning_selfcompress.packing.levels import kinds_of, number_classes
from lightning_selfcompress.packing.rans import EVEN, INCREMENT, lane_count
from lightning_selfcompress.packing.tokens import tokens_of
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.formula import bit_depth, codes
from lightning_selfcompress.quantize.parameters import quantized_parameters


def bits_of_counts(counts, starts=None):
    """Bits of symbols with these counts, zeros included, in one adaptive table that starts with these counts."""
    priors = [start / INCREMENT for start in ([EVEN] * len(counts) if starts is None else starts)]
    bits = math.lgamma(sum(priors) + sum(counts)) - math.lgamma(sum(priors))
    return (bits - sum(math.lgamma(p + n) - math.lgamma(p) for p, n in zip(priors, counts, strict=True))) / math.log(2)


def sampled_codes(p):
    """Some codes of each channel, and how many codes each stands for."""
    rows = to_rows(p.latent.detach(), p.spec.axis)
    sample = rows[:, :: min(max(1, rows.numel() // estimate.SAMPLE), rows.shape[1])]
    depth, exponent = bit_depth(p.raw_depth.detach())[:, None], p.exponent.detach()[:, None]
    found = codes(sample.to(depth), depth, exponent).nan_to_num(0).numpy().astype(int)
    return found, rows.shape[1] / sample.shape[1]


def bits_alone(p):
    """The estimated bits of the codes and of the channels of one weight, in plain loops over tables and codes."""
    found, scale = sampled_codes(p)
    bounds = bounds_of(found)
    classes, (kinds,) = number_classes(kinds_of(found, bounds), np.zeros(len(found), int), 1)
    ends = at_bounds(found, bounds)
    shifted = tokens_of(found.reshape(-1)).reshape(found.shape) + 2 * (bounds > 0)[:, None]
    symbols = np.where(ends, found > 0, shifted)
    alphabet = int(symbols[classes > 0].max(initial=0)) + 1
    of_codes = scale * sum(
        int(code).bit_length() - 1 for code in abs(found[~ends & (classes > 0)[:, None]]).tolist() if code >= 8
    )
    for c, start in enumerate(kinds.start_counts(alphabet).tolist(), 1):
        counts = np.bincount(symbols[classes == c].reshape(-1), minlength=alphabet)
        of_codes += bits_of_counts((scale * counts).tolist(), start)
    sixteenths = np.round(16 * p.exponent.detach().double().numpy()).astype(int)[classes > 0]
    exponents = np.bincount(sixteenths - sixteenths.min(initial=1 << 30), minlength=1)
    of_classes = np.bincount(classes, minlength=kinds.number)
    return of_codes, sum(map(bits_of_counts, (of_classes, exponents, np.bincount(bounds[classes > 0], minlength=1))))


def clipped():
    """A layer with channels that have bounds, some of them dead, and some that are not clipped."""
    layer = with_depths(nn.Linear(300, 40))
    with torch.no_grad():
        layer.exponent[::3] -= 6
    return layer


def not_finite():
    """A layer with weights that are NaN."""
    layer = with_depths(nn.Conv2d(3, 5, 3))
    with torch.no_grad():
        layer.latent("weight")[1] = math.nan
        layer.latent("weight")[2, 0] = math.nan
    return layer


def all_sorts():
    """Layers of every kind, large ones and others, in an order in which neighbors differ."""
    layers = [with_depths(kind.make()) for kind in KINDS.values()]
    embedding = with_depths(nn.Embedding(40_000, 6))
    layers[3:3] = [clipped(), embedding, not_finite(), with_depths(nn.Linear(5, 4), low=-2.0, high=0.0)]
    layers[9:9] = [clipped(), with_depths(nn.ConvTranspose2d(64, 96, 3, groups=4)), with_depths(nn.Linear(5, 4))]
    layers[12:12] = [with_depths(nn.Linear(500, 70).double()), with_depths(nn.Linear(300, 300), low=6.0, high=14.0)]
    layers[6:6] = [with_depths(nn.Linear(2, 40_000, bias=False))]
    net = nn.ModuleList(layers)
    empty = with_depths(nn.Linear(3, 4))
    empty._parameters["weight"] = nn.Parameter(torch.empty(4, 0))
    return net.append(empty)


NETWORKS = {
    "all sorts": all_sorts,
    "mixed": lambda: with_depths(mixed_net()),
    "many": lambda: with_depths(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(60)))),
    "dead": lambda: with_depths(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), low=-2.0, high=0.0),
    "float": lambda: nn.Linear(3, 4),
}


@pytest.mark.parametrize("batch", [1, 1000, estimate.BATCH])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_at_once_are_each_layer_alone(name, batch, monkeypatch):
    """Whatever layers share a batch, the estimate of each is the one of its own codes; the sums are theirs."""
    monkeypatch.setattr(estimate, "BATCH", batch)
    torch.manual_seed(0)
    net = NETWORKS[name]()
    expected = {p.name: bits_alone(p) for p in quantized_parameters(net) if p.latent.numel()}
    size = estimated_size(net)
    assert size.codes.keys() == size.channels.keys() == expected.keys()
    half = 0.5 + 1e-6  # sizes are whole bytes
    for key, (of_codes, of_channels) in expected.items():
        assert size.codes[key] == pytest.approx(of_codes / 8, abs=half, rel=0)
        assert size.channels[key] == pytest.approx(of_channels / 8, abs=half, rel=0)
    of_codes, of_channels = (sum(bits) / 8 for bits in zip((0, 0), *expected.values(), strict=True))
    symbols = sum(t.codes.living.size for t in Packed.of(net, measured=True).coded)
    lanes = estimate.LANE_NBYTES * lane_count(symbols) if expected else 0
    assert size.code_nbytes == pytest.approx(of_codes + lanes, abs=half, rel=0)
    assert size.channel_nbytes == pytest.approx(of_channels, abs=half, rel=0)


def test_kept_channels_of_experts():
    """The estimate of what is kept of a weight with experts is that of the smaller weight."""
    torch.manual_seed(0)
    net = nn.ParameterDict({"experts": torch.randn(3, 8, 40)})
    convert(net, axes={"experts": ChannelAxis(1, groups=3)})
    kept = torch.tensor([0, 2, 5])
    size = estimated_size(net, {"experts": {1: kept, 2: torch.arange(30)}})
    smaller = nn.ParameterDict({"experts": net.latent("experts").detach()[:, kept, :30].clone()})
    convert(smaller, axes={"experts": ChannelAxis(1, groups=3)})
    for mine, other in zip(smaller.learned("experts"), net.learned("experts"), strict=True):
        mine.data.copy_(other.detach().view(3, 8)[:, kept].flatten())
    assert (size.codes, size.channels) == (estimated_size(smaller).codes, estimated_size(smaller).channels)


def test_the_sorts_are_there():
    """The networks of the test above have channels with bounds, dead channels, large codes, samples and whole rows."""
    torch.manual_seed(0)
    found = [(p, *sampled_codes(p)) for p in quantized_parameters(all_sorts()) if p.latent.numel()]
    assert sum((bounds_of(rows) > 0).any() for _, rows, _ in found) >= 2
    assert sum((~rows.any(1)).any() for _, rows, _ in found) >= 2
    assert any(abs(rows).max() >= 1 << 10 for _, rows, _ in found)
    assert len({scale for *_, scale in found} - {1.0}) >= 2
    assert any(p.latent.isnan().any() for p, *_ in found)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 5), st.sampled_from([1.0, 2.5])), max_size=6
    )
)
def test_tables_of_different_alphabets(tables):
    """Each table has the bits of its own symbols and alphabet; a table without symbols has none."""
    symbols = np.array([s for some, *_ in tables for s in some], np.int64)
    owners = np.repeat(np.arange(len(tables)), [len(some) for some, *_ in tables])
    alphabets = np.array([max(some, default=0) + more for some, more, _ in tables], np.int64)
    bits = table_bits(symbols, owners, alphabets, np.array([scale for *_, scale in tables]))
    counts = [np.bincount(np.array(some, int), minlength=n) for (some, *_), n in zip(tables, alphabets, strict=True)]
    expected = [bits_of_counts((scale * n).tolist()) for n, (*_, scale) in zip(counts, tables, strict=True)]
    assert bits == pytest.approx(expected, abs=1e-9)
