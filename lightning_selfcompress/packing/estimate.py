"""An estimate of the size of a packed file from a sample of the weights, cheap enough for every training step."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.packing.bounds import bounds_of, to_symbols, to_tokens
from lightning_selfcompress.packing.content import Codes, Packed, PackedTensor, as_bytes, as_it_is, attributes, to_rows
from lightning_selfcompress.packing.heads import head_bytes
from lightning_selfcompress.packing.levels import Classes, kinds_of, number_classes
from lightning_selfcompress.packing.narrow_floats import is_vector, rounded
from lightning_selfcompress.packing.rans import EVEN, INCREMENT, lane_count
from lightning_selfcompress.packing.structure import EXPONENT_BEFORE, Alphabets
from lightning_selfcompress.packing.tokens import DIRECT, extra_bit_counts, tokens_of
from lightning_selfcompress.packing.writing import PackedSize, value_bytes
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, bit_depth, codes
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.tensors import stored_tensors, whole

Numbers = NDArray[Any]


SAMPLE = 1 << 14  # approximate number of weights that are sampled from each layer


LANE_NBYTES = 1  # a lane has a state of 4 bytes, of which it ends with 2 of what follows and holds about one of codes


BATCH = 1 << 16  # number of sampled weights at which a batch is full: small layers share one, its arrays fit the cache


def table_bits(
    symbols: Numbers,  # (n,) or more dimensions
    tables: Numbers,  # (broadcasts to symbols)
    alphabets: Numbers,  # (tables,)
    scales: Numbers | float = 1.0,  # (tables,)
    starts: Numbers | None = None,  # (symbols of all tables,)
) -> Numbers:
    """Estimates the bits of symbols that are coded with adaptive tables, ``(tables,)``.

    The counts of an adaptive table grow by :data:`INCREMENT`. A sequence then has the probability of a
    Dirichlet-multinomial distribution, in any order of the symbols.

    Args:
        symbols: The symbols of all tables.
        tables: Number of the table of each symbol.
        alphabets: Number of possible symbols of each table.
        scales: How many symbols each symbol of a table stands for.
        starts: The counts with which the tables start, one table after another; None if all start with :data:`EVEN`.
    """
    ends = np.cumsum(alphabets)
    size = int(ends[-1]) if len(ends) else 0
    counts = np.bincount(((ends - alphabets)[tables] + symbols).reshape(-1), minlength=size)
    found = np.flatnonzero(counts)  # a symbol that does not occur adds nothing
    owners = np.repeat(np.arange(len(alphabets)), alphabets)
    of = owners[found]
    n = counts[found] * np.broadcast_to(scales, len(alphabets))[of]
    start = (np.full(size, float(EVEN)) if starts is None else starts) / INCREMENT
    total = np.bincount(owners, start, len(alphabets))
    all_of_them = _lgamma(total + np.bincount(of, n, len(alphabets))) - _lgamma(total)
    one_by_one = np.bincount(of, _lgamma(start[found] + n) - _lgamma(start[found]), len(alphabets))
    bits: Numbers = (all_of_them - one_by_one) / math.log(2)
    return bits


def _lgamma(values: Numbers) -> Numbers:
    logarithms: Numbers = torch.lgamma(torch.from_numpy(values)).numpy()
    return logarithms


Kept = Mapping[str, Mapping[int, Tensor]]  # name of a tensor -> dimension -> positions that count


def estimated_size(model: nn.Module, kept: Kept | None = None, *, narrow: bool = False) -> PackedSize:
    """Estimates the parts of the size of a model's packed file; the total is right within some percent.

    Args:
        model: Any module.
        kept: The positions that count, for each dimension of which not all do: name -> dimension -> positions, int64.
        narrow: Whether vectors in float count as they will be once they are :func:`rounded`.
    """
    parameters, kept = list(quantized_parameters(model)), kept or {}
    coded = {id(p.latent): p for p in parameters if p.latent.numel()}
    learned = {id(t) for p in parameters for t in p.learned}
    found = _coded_bits(coded.values(), kept)
    tensors, estimates = [], {}
    for name, tensor in stored_tensors(model, transient=False).items():
        if id(tensor) in coded:
            tensors.append(_stand_in(name, tensor, coded[id(tensor)]))
            estimates[name] = found[id(tensor)]
        elif id(tensor) not in learned:
            left = _part(whole(tensor.detach()), kept.get(name, {})).cpu()
            tensors.append(as_it_is(name, as_bytes(rounded(left) if narrow and is_vector(left) else left)))
    packed = Packed(tuple(tensors), dict(attributes(model)))
    head = head_bytes(packed, [(e.alphabets, e.first_exponent) for e in estimates.values()])
    lanes = lane_count(sum(e.symbols for e in estimates.values())) if estimates else 0
    return PackedSize(
        {name: round(e.code_bits / 8) for name, e in estimates.items()},
        {name: round(e.channel_bits / 8) for name, e in estimates.items()},
        {t.name: len(value_bytes(t)) for t in tensors if t.codes is None},
        round(sum(e.code_bits for e in estimates.values()) / 8 + LANE_NBYTES * lanes),
        round(sum(e.channel_bits for e in estimates.values()) / 8),
        len(head) + 4,
    )


def _stand_in(name: str, latent: Tensor, parameter: QuantizedParameter) -> PackedTensor:
    """Returns a coded tensor that has no codes, for the head."""
    none = np.zeros(0, np.int16)
    codes = Codes(parameter.spec.axis, none, none.reshape(0, 0), none)
    return PackedTensor(name, latent.dtype, tuple(latent.shape), codes=codes)


class Estimate(NamedTuple):
    """What is estimated of one coded tensor.

    Args:
        code_bits: Bits of the codes.
        channel_bits: Bits of the channels' classes, exponents and bounds.
        symbols: Number of all codes that are stored.
        alphabets: The alphabets of the sample.
        first_exponent: The smallest exponent of the channels that are not in class 0, in sixteenths.
    """

    code_bits: float
    channel_bits: float
    symbols: int
    alphabets: Alphabets
    first_exponent: int


@torch.no_grad()
def _coded_bits(
    parameters: Iterable[QuantizedParameter],  # none of them empty
    kept: Kept,
) -> dict[int, Estimate]:
    """Estimates each weight, by the id of the latent weight."""
    found: dict[int, Estimate] = {}
    for samples in _batches(parameters, kept):
        for sample, estimate in zip(samples, _estimates(samples), strict=True):
            found[id(sample.parameter.latent)] = estimate
    return found


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some weights of each channel of a quantized weight.

    Args:
        parameter: The quantized weight.
        rows: The sampled weights, ``(channels, weights sampled per channel)``, in the dtype of the bit depths.
        learned: The raw bit depths and the exponents of these channels, ``(channels,)`` each.
        scale: How many weights each sampled weight stands for.
    """

    parameter: QuantizedParameter
    rows: Tensor
    learned: tuple[Tensor, Tensor]
    scale: float

    @classmethod
    def of(cls, parameter: QuantizedParameter, kept: Mapping[int, Tensor]) -> "_Sample":
        axis, learned = parameter.spec.axis, tuple(t.detach() for t in parameter.learned)
        latent = whole(parameter.latent.detach())
        kept = kept if axis.groups == 1 or (axis.groups == len(latent) and 0 not in kept) else {}
        rows = to_rows(_part(latent, kept), axis)
        along = {0: _in_all_groups(kept[axis.dim], axis.groups, latent.shape[axis.dim])} if axis.dim in kept else {}
        depth, exponent = (_part(t, along) for t in learned)
        stride = min(max(1, rows.numel() // SAMPLE), rows.shape[1])
        sample = rows[:, ::stride]
        # a copy, if it is a part, so that a gathered weight does not stay in memory
        sample = sample.to(depth.dtype).contiguous()
        return cls(parameter, sample, (depth, exponent), rows.shape[1] / sample.shape[1])


def _part(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Returns the positions of a tensor that count."""
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor


def _in_all_groups(positions: Tensor, groups: int, channels: int) -> Tensor:
    """Returns the positions in an array ``(groups * channels,)`` of positions among the channels of a group."""
    return (positions + channels * torch.arange(groups, device=positions.device)[:, None]).flatten()


def _batches(parameters: Iterable[QuantizedParameter], kept: Kept) -> Iterator[list[_Sample]]:
    """Yields samples of weights, together if their rows are of the same length, up to :data:`BATCH` entries."""
    waiting: dict[tuple[object, ...], list[_Sample]] = {}
    sizes: Counter[tuple[object, ...]] = Counter()
    for sample in (_Sample.of(p, kept.get(p.name, {})) for p in parameters):
        alike = (sample.rows.shape[1], sample.rows.dtype, sample.rows.device)
        waiting.setdefault(alike, []).append(sample)
        sizes[alike] += sample.rows.numel()
        if sizes[alike] >= BATCH:
            del sizes[alike]
            yield waiting.pop(alike)
    yield from waiting.values()


def _estimates(samples: Sequence[_Sample]) -> list[Estimate]:
    """Estimates weights with rows of the same length."""
    depth, exponent = (torch.cat(some)[:, None] for some in zip(*(s.learned for s in samples), strict=True))
    rows = torch.cat([s.rows for s in samples])
    found = codes(rows, bit_depth(depth), exponent).nan_to_num_(0).cpu().numpy().astype(np.int32)
    owners = np.repeat(np.arange(len(samples)), [len(s.rows) for s in samples])
    bounds = bounds_of(found)
    classes, kinds = number_classes(kinds_of(found, bounds), owners, len(samples))
    alive = classes > 0
    scales = np.array([s.scale for s in samples])
    living = owners[alive]
    of_codes, symbols = _code_bits(found[alive], bounds[alive], classes[alive], kinds, living, scales)
    sixteenths = (exponent[:, 0] * EXPONENT_STEPS).round().cpu().numpy().astype(np.int64)[alive]
    first = -_largest(-sixteenths, living, len(samples), least=-(1 << 62))
    first = np.where(np.bincount(living, minlength=len(samples)) > 0, first, EXPONENT_BEFORE)
    of_classes = table_bits(classes, owners, np.array([k.number for k in kinds]))
    others = [(sixteenths - first[living]), bounds[alive]]
    sizes = [_largest(other, living, len(samples)) + 1 for other in others]
    of_others = [table_bits(other, living, size) for other, size in zip(others, sizes, strict=True)]
    stored = np.bincount(living, minlength=len(samples)) * np.array([round(s.rows.shape[1] * s.scale) for s in samples])
    alphabets = map(Alphabets, kinds, *(size.tolist() for size in sizes), symbols.tolist())
    of_channels = of_classes + sum(of_others)
    numbers = (of_codes.tolist(), of_channels.tolist(), stored.tolist(), alphabets, first.tolist())
    return [Estimate(*those) for those in zip(*numbers, strict=True)]


def _code_bits(
    found: Numbers,  # (channels, weights sampled per channel)
    bounds: Numbers,  # (channels,)
    classes: Numbers,  # (channels,)
    kinds: Sequence[Classes],
    owners: Numbers,  # (channels,)
    scales: Numbers,  # (weights,)
) -> tuple[Numbers, Numbers]:
    """Estimates the bits of the codes of each weight, and the number of possible symbols, both ``(weights,)``.

    Args:
        found: Sampled codes of channels that are not in class 0.
        bounds: Bounds of the channels.
        classes: Classes of the channels.
        kinds: Classes of each weight.
        owners: Number of the weight that has each channel.
        scales: How many weights each sampled weight stands for.
    """
    tokens = tokens_of(found.T.reshape(-1)).reshape(found.T.shape)
    symbols = to_symbols(tokens, found.T, bounds).astype(np.int64)
    alphabets = _largest(symbols.max(0, initial=0), owners, len(scales)) + 1
    starts = [k.start_counts(alphabet) for k, alphabet in zip(kinds, alphabets.tolist(), strict=True)]
    tables = np.array([len(start) for start in starts])
    of_table = np.repeat(np.arange(len(scales)), tables)
    first = np.cumsum(tables) - tables
    flat = np.concatenate([start.reshape(-1) for start in starts])
    bits = table_bits(symbols, first[owners] + classes - 1, alphabets[of_table], scales[of_table], flat)
    large = to_tokens(symbols, bounds)
    place, channel = np.nonzero(large >= DIRECT)
    extra = np.bincount(owners[channel], extra_bit_counts(large[place, channel]), len(scales))
    found_bits: Numbers = np.bincount(of_table, bits, len(scales)) + extra * scales
    return found_bits, alphabets


def _largest(
    values: Numbers,  # (channels,)
    owners: Numbers,  # (channels,)
    count: int,
    least: int = 0,
) -> Numbers:
    """Returns the largest value of each weight's channels, at least ``least``, ``(weights,)``, int64."""
    found = np.full(count, least, np.int64)
    np.maximum.at(found, owners, values)
    return found
