"""An estimate of the size of a packed file from a sample of the weights, cheap enough for every training step."""

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
from lightning_selfcompress.packing.writing import PackedSize, classes_of, name_bytes, value_bytes
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, bit_depth, codes
from lightning_selfcompress.quantize.layers import whole
from lightning_selfcompress.quantize.parameters import QuantizedParameter, learned_tensors, quantized_parameters
from lightning_selfcompress.tensors import stored_tensors

SAMPLE = 1 << 14  # approximate number of weights that are sampled from each layer


def table_bits(
    counts: NDArray[Any],  # (tables, alphabet)
) -> float:
    """Estimates the bits of symbols with these counts, each row coded with an adaptive table of its own.

    The counts of an adaptive table start at 1 and grow by :data:`INCREMENT`. A sequence then has the probability of a
    Dirichlet-multinomial distribution, in any order of the symbols.

    Args:
        counts: Number of occurrences of each symbol in the context of each table.
    """
    start = torch.tensor(1 / INCREMENT, dtype=torch.float64)
    n = torch.from_numpy(counts)
    all_of_them = torch.lgamma(start * n.shape[1] + n.sum(1)) - torch.lgamma(start * n.shape[1])
    one_by_one = (torch.lgamma(start + n) - torch.lgamma(start)).sum(1)
    return float((all_of_them - one_by_one).sum() / np.log(2))


def estimated_size(model: nn.Module) -> PackedSize:
    """Estimates the parts of the size of a model's packed file; the total is right within some percent.

    Args:
        model: Any module.
    """
    parameters = {id(p.latent): p for p in quantized_parameters(model)}
    learned = learned_tensors(model)
    of_codes, of_channels, values, head = {}, {}, {}, 16
    previous = ""
    for name, tensor in stored_tensors(model, transient=False).items():
        if id(tensor) in learned:
            continue
        head += (
            len(name_bytes(name, previous)) + 2 + sum(1 if n < 128 else 2 if n < 1 << 14 else 3 for n in tensor.shape)
        )
        previous = name
        if id(tensor) in parameters and tensor.numel():
            of_codes[name], of_channels[name] = _coded_bits(parameters[id(tensor)])
            head += 8
        else:
            values[name] = len(value_bytes(as_it_is(name, as_bytes(whole(tensor.detach()).cpu()))))
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
def _coded_bits(parameter: QuantizedParameter) -> tuple[float, float]:
    """Estimates the bits of a weight's codes, and the bits of its channels' classes, exponents and bounds."""
    axis, latent = parameter.spec.axis, whole(parameter.latent.detach())
    rows = to_rows(latent, axis)
    stride = max(1, latent.numel() // SAMPLE)
    sample = rows[:, ::stride] if stride < rows.shape[1] else rows[:, :1]
    scale = rows.shape[1] / max(sample.shape[1], 1)
    depth, exponent = bit_depth(parameter.raw_depth.detach())[:, None], parameter.exponent.detach()[:, None]
    found = codes(sample.to(depth), depth, exponent).nan_to_num_(0).cpu().numpy().astype(np.int32)
    bounds = bounds_of(found)
    classes = classes_of(found, bounds)
    alive = classes > 0
    living = found[alive].T
    tokens = tokens_of(living.reshape(-1)).reshape(living.shape)
    symbols = to_symbols(tokens, living, bounds[alive]).astype(np.int64)
    bits = 0.0
    if symbols.size:
        alphabet = int(symbols.max()) + 1
        counts = np.bincount(
            ((classes[alive] - 1) * alphabet + symbols).reshape(-1), minlength=int(classes.max()) * alphabet
        )
        large = to_tokens(symbols, bounds[alive])
        bits = table_bits(counts.reshape(-1, alphabet) * scale) + scale * float(
            extra_bit_counts(large[large >= DIRECT]).sum(dtype=np.int64)
        )
    sixteenths = _whole_numbers(exponent[:, 0] * EXPONENT_STEPS)[alive]
    relative = np.zeros(len(classes), np.int64)
    relative[alive] = sixteenths - sixteenths.min() if len(sixteenths) else 0
    kinds = (classes, relative, bounds)
    return bits, sum(table_bits(np.bincount(kind)[None].astype(np.float64)) for kind in kinds)


def _whole_numbers(values: Tensor) -> NDArray[np.int64]:
    return values.round().cpu().numpy().astype(np.int64)
