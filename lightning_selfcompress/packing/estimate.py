"""An estimate of the size of a packed file from a sample of the weights, cheap enough for every training step."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.packing import varint
from lightning_selfcompress.packing.bounds import bounds_of, to_symbols, to_tokens
from lightning_selfcompress.packing.content import as_bytes, as_it_is, attributes, to_rows
from lightning_selfcompress.packing.rans import INCREMENT
from lightning_selfcompress.packing.tokens import DIRECT, extra_bit_counts, tokens_of
from lightning_selfcompress.packing.writing import PackedSize, kinds_of, name_bytes, number_classes, value_bytes
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, bit_depth, codes
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.tensors import stored_tensors, whole

Numbers = NDArray[Any]


SAMPLE = 1 << 14  # approximate number of weights that are sampled from each layer


BATCH = 1 << 16  # number of sampled weights at which a batch is full: small layers share one, its arrays fit the cache


def table_bits(
    symbols: Numbers,  # (n,) or more dimensions
    tables: Numbers,  # (broadcasts to symbols)
    alphabets: Numbers,  # (tables,)
    scales: Numbers | float = 1.0,  # (tables,)
) -> Numbers:
    """Estimates the bits of symbols that are coded with adaptive tables, ``(tables,)``.

    The counts of an adaptive table start at 1 and grow by :data:`INCREMENT`. A sequence then has the probability of a
    Dirichlet-multinomial distribution, in any order of the symbols.

    Args:
        symbols: The symbols of all tables.
        tables: Number of the table of each symbol.
        alphabets: Number of possible symbols of each table.
        scales: How many symbols each symbol of a table stands for.
    """
    ends = np.cumsum(alphabets)
    counts = np.bincount(
        ((ends - alphabets)[tables] + symbols).reshape(-1), minlength=int(ends[-1]) if len(ends) else 0
    )
    found = np.flatnonzero(counts)  # a symbol that does not occur adds nothing
    of = np.repeat(np.arange(len(alphabets)), alphabets)[found]
    n = counts[found] * np.broadcast_to(scales, len(alphabets))[of]
    start = 1 / INCREMENT
    all_of_them = _lgamma(start * alphabets + np.bincount(of, n, len(alphabets))) - _lgamma(start * alphabets)
    one_by_one = np.bincount(of, _lgamma(start + n) - math.lgamma(start), len(alphabets))
    bits: Numbers = (all_of_them - one_by_one) / math.log(2)
    return bits


def _lgamma(values: Numbers) -> Numbers:
    logarithms: Numbers = torch.lgamma(torch.from_numpy(values)).numpy()
    return logarithms


Kept = Mapping[str, Mapping[int, Tensor]]  # name of a tensor -> dimension -> positions that count


def estimated_size(model: nn.Module, kept: Kept | None = None) -> PackedSize:
    """Estimates the parts of the size of a model's packed file; the total is right within some percent.

    Args:
        model: Any module.
        kept: The positions that count, for each dimension of which not all do: name -> dimension -> positions, int64.
    """
    parameters, kept = list(quantized_parameters(model)), kept or {}
    coded = {id(p.latent): p for p in parameters if p.latent.numel()}
    learned = {id(t) for p in parameters for t in p.learned}
    bits = _coded_bits(coded.values(), kept)
    of_codes, of_channels, values, head = {}, {}, {}, 16
    previous = ""
    for name, tensor in stored_tensors(model, transient=False).items():
        if id(tensor) in learned:
            continue
        head += (
            len(name_bytes(name, previous)) + 2 + sum(1 if n < 128 else 2 if n < 1 << 14 else 3 for n in tensor.shape)
        )
        previous = name
        if id(tensor) in coded:
            of_codes[name], of_channels[name] = bits[id(tensor)]
            head += 8
        else:
            left = _part(whole(tensor.detach()), kept.get(name, {}))
            values[name] = len(value_bytes(as_it_is(name, as_bytes(left.cpu()))))
    for name, number in attributes(model):
        head += len(name_bytes(name, previous)) + len(varint.write(number))
        previous = name
    return PackedSize(
        {name: round(bits / 8) for name, bits in of_codes.items()},
        {name: round(bits / 8) for name, bits in of_channels.items()},
        values,
        round(sum(of_codes.values()) / 8) + 4,
        round(sum(of_channels.values()) / 8) + 4,
        head,
    )


@torch.no_grad()
def _coded_bits(
    parameters: Iterable[QuantizedParameter],  # none of them empty
    kept: Kept,
) -> dict[int, tuple[float, float]]:
    """Estimates the bits of weights' codes, and the bits of their channels' classes, exponents and bounds.

    Returns:
        Both numbers of each weight, by the id of the latent weight.
    """
    found: dict[int, tuple[float, float]] = {}
    for samples in _batches(parameters, kept):
        for sample, (of_codes, of_channels) in zip(samples, _bits_of(samples).tolist(), strict=True):
            found[id(sample.parameter.latent)] = of_codes, of_channels
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
        kept = kept if axis.groups == 1 else {}
        rows = to_rows(_part(whole(parameter.latent.detach()), kept), axis)
        along = {0: kept[axis.dim]} if axis.dim in kept else {}
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


def _bits_of(samples: Sequence[_Sample]) -> Numbers:
    """Estimates the bits of the codes and of the channels of weights with rows of the same length, ``(weights, 2)``."""
    depth, exponent = (torch.cat(some)[:, None] for some in zip(*(s.learned for s in samples), strict=True))
    rows = torch.cat([s.rows for s in samples])
    found = codes(rows, bit_depth(depth), exponent).nan_to_num_(0).cpu().numpy().astype(np.int32)
    owners = np.repeat(np.arange(len(samples)), [len(s.rows) for s in samples])
    bounds = bounds_of(found)
    classes = number_classes(kinds_of(found, bounds), owners)
    alive = classes > 0
    scales = np.array([s.scale for s in samples])
    of_codes = _code_bits(found[alive], bounds[alive], classes[alive], owners[alive], scales)
    sixteenths = (exponent[:, 0] * EXPONENT_STEPS).round().cpu().numpy().astype(np.int64)
    first = -_largest(-sixteenths[alive], owners[alive], len(samples), least=-(1 << 62))
    kinds = (classes, np.where(alive, sixteenths - first[owners], 0), bounds)
    of_channels = [table_bits(kind, owners, _largest(kind, owners, len(samples)) + 1) for kind in kinds]
    return np.stack([of_codes, np.sum(of_channels, 0)], 1)


def _code_bits(
    found: Numbers,  # (channels, weights sampled per channel)
    bounds: Numbers,  # (channels,)
    classes: Numbers,  # (channels,)
    owners: Numbers,  # (channels,)
    scales: Numbers,  # (weights,)
) -> Numbers:
    """Estimates the bits of the codes of each weight, ``(weights,)``.

    Args:
        found: Sampled codes of channels that are not in class 0.
        bounds: Bounds of the channels.
        classes: Classes of the channels.
        owners: Number of the weight that has each channel.
        scales: How many weights each sampled weight stands for.
    """
    tokens = tokens_of(found.T.reshape(-1)).reshape(found.T.shape)
    symbols = to_symbols(tokens, found.T, bounds).astype(np.int64)
    tables = _largest(classes, owners, len(scales))  # of each weight: the classes from 1 to the largest
    alphabets = _largest(symbols.max(0, initial=0), owners, len(scales)) + 1
    of_table = np.repeat(np.arange(len(scales)), tables)
    first = np.cumsum(tables) - tables
    bits = table_bits(symbols, first[owners] + classes - 1, alphabets[of_table], scales[of_table])
    large = to_tokens(symbols, bounds)
    place, channel = np.nonzero(large >= DIRECT)
    extra = np.bincount(owners[channel], extra_bit_counts(large[place, channel]), len(scales))
    found_bits: Numbers = np.bincount(of_table, bits, len(scales)) + extra * scales
    return found_bits


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
