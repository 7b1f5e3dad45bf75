"""Packed files: megabytes a second, and bytes beside those of general compressors and of other entropy coders.

    pip install zstandard==0.25.0 constriction==0.5.0
    python benchmarks/packing.py                            # LeNet-5 and ResNet-18 with random codes
    python benchmarks/packing.py --checkpoint runs/mnist/compressed/checkpoints/last.ckpt \
        --model lightning_selfcompress.demo:LeNet5

The random networks have Laplacian codes at depths of 2 to 4 bits, and 15% of their channels are dead. Speed is the best
of some runs on one thread, of the float32 weights (4 bytes each) of the channels that are alive, and of all. The sizes
are those of the codes of living channels: the compressors get them a byte each, or two where a layer needs them; the
range coder codes each layer by its own histogram, whose table counts 2 bytes per code that occurs; the entropies count
no tables at all. What this package takes for its tables, the classes of its channels, is counted with it.
"""

import argparse
import lzma
import time
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import constriction
import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from step_time import lenet5, resnet18
from torch import nn

from lightning_selfcompress import convert, load_from_checkpoint
from lightning_selfcompress.packing import Packed, from_bytes, packed_size, rans, to_bytes
from lightning_selfcompress.packing.bounds import bounds_of
from lightning_selfcompress.packing.writing import classes_of
from lightning_selfcompress.quantize.parameters import quantized_parameters

Codes = NDArray[Any]


@torch.no_grad()
def with_random_codes(model: nn.Module, seed: int = 0) -> nn.Module:
    """Converts a network and gives it Laplacian codes, depths of 2 to 4 bits, and 15% dead channels."""
    convert(model)
    random = np.random.default_rng(seed)
    for p in quantized_parameters(model):
        depths = np.where(random.random(p.channels) < 0.15, 0, random.uniform(2, 4, p.channels))
        exponents = random.integers(-90, -70, p.channels) / 16
        spread = np.exp2(exponents + depths - 3)  # the mean magnitude is a quarter of the range
        split = p.spec.axis.split(p.latent)
        p.raw_depth.copy_(torch.from_numpy(depths))
        p.exponent.copy_(torch.from_numpy(exponents))
        noise = torch.from_numpy(random.laplace(size=tuple(split.shape)))
        p.latent.copy_(p.spec.axis.join(noise * p.spec.axis.expand(torch.from_numpy(spread), split)))
    return model


def from_checkpoint(path: str, model: str) -> nn.Module:
    """The network of a checkpoint."""
    module, _, name = model.partition(":")
    model_class: type[nn.Module] = getattr(import_module(module), name)
    return load_from_checkpoint(model_class, path, map_location="cpu")


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The time of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def entropy_bits(codes: Codes) -> float:
    """Order-0 entropy of all codes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def range_coded_nbytes(layers: list[Codes]) -> int:
    """Bytes with one range coder and a histogram for each layer, its table included."""
    encoder, tables = constriction.stream.queue.RangeEncoder(), 0
    for codes in layers:
        values, symbols, counts = np.unique(codes, return_inverse=True, return_counts=True)
        if len(values) > 1:
            model = constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
            encoder.encode(symbols.astype(np.int32), model)
        tables += 2 * len(values)
    return tables + 4 * len(encoder.get_compressed())


def class_nbytes(packed: Packed) -> float:
    """Bytes that tell how each channel's codes are coded: with which table, and what bounds they have."""
    codes = [t.codes.rows for t in packed.coded if t.codes is not None]
    numbers = [number for c in codes for number in (classes_of(c, bounds_of(c)), bounds_of(c))]
    parts = [rans.Part(np.zeros(len(n), np.uint8), 1, int(n.max(initial=0)) + 1, n) for n in numbers]
    return sum(rans.code_bits(parts)) / 8


def sizes(packed: Packed) -> dict[str, float]:
    """Bytes of the codes of the living channels, by several ways to store them."""
    layers = []
    for tensor in packed.coded:
        assert tensor.codes is not None
        layers.append(tensor.codes.living.reshape(-1))
    content = b"".join(codes.astype(np.int8 if codes.dtype == np.int8 else "<i2").tobytes() for codes in layers)
    return {
        "this package": packed_size(packed).code_nbytes + class_nbytes(packed),
        "zlib": len(zlib.compress(content, 9)),
        "lzma": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
        "zstandard": len(zstandard.ZstdCompressor(level=19).compress(content)),
        "constriction": range_coded_nbytes(layers),
        "entropy by layer": sum(map(entropy_bits, layers)) / 8,
        "entropy of all": entropy_bits(np.concatenate(layers)) / 8,
    }


def measure(name: str, model: nn.Module, repeats: int) -> None:
    """Prints the figures of one network."""
    original = sum(p.spec.original_numel for p in quantized_parameters(model))
    packed = Packed.of(model)
    data = to_bytes(packed)
    left = sum(t.codes.living.size for t in packed.coded if t.codes is not None)
    size = packed_size(packed)
    print(f"{name}: {left:,} of {original:,} weights left")
    print(
        f"  {len(data):,} bytes: codes {size.code_nbytes:,}, channels {size.channel_nbytes:,}, "
        f"everything else as it is {sum(size.values.values()):,}, structure {size.structure_nbytes:,}"
    )
    runs: dict[str, Callable[[], object]] = {
        "read the model": lambda: Packed.of(model),
        "encode": lambda: to_bytes(packed),
        "packed_size": lambda: packed_size(packed),
        "decode": lambda: from_bytes(data),
        "decode and dequantize": lambda: [t.tensor() for t in from_bytes(data).tensors],
    }
    for what, run in runs.items():
        taken = seconds(run, repeats)
        rates = f"{4e-6 * left / taken:,.1f} MB/s of the weights left, {4e-6 * original / taken:,.1f} of all"
        print(f"  {what}: {1000 * taken:,.1f} ms, {rates}")
    by_way = sizes(packed)
    for way, nbytes in by_way.items():
        print(f"  {way}: {nbytes:,.0f} bytes, {nbytes / by_way['this package']:.3f} times this package")


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a Lightning checkpoint of a run with SelfCompression")
    parser.add_argument("--model", help="package.module:Class of the checkpoint's LightningModule")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.checkpoint:
        if not arguments.model:
            parser.error("Expected --model package.module:Class with --checkpoint.")
        measure(arguments.checkpoint, from_checkpoint(arguments.checkpoint, arguments.model), arguments.repeats)
        return
    measure("LeNet-5", with_random_codes(lenet5()), arguments.repeats)
    measure("ResNet-18", with_random_codes(resnet18()), arguments.repeats)


if __name__ == "__main__":
    main()
