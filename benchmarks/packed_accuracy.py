"""Whether a packed file is the network that was validated, and how near it comes to the entropy of its codes.

    python benchmarks/packed_accuracy.py mnist CHECKPOINT --data-dir path/to/data    # LeNet-5 of the demo
    python benchmarks/packed_accuracy.py cifar CHECKPOINT --data-dir path/to/data    # a ResNet of cifar.py

Opens the checkpoint of a compressed run, exports it, loads the file into a fresh float network, and compares both on
the whole test set: accuracy, and every logit to the bit. The same with float16 for what is not quantized.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from cifar import CifarData, CifarNet
from torch import Tensor

from lightning_selfcompress import export, load, load_from_checkpoint, size_report
from lightning_selfcompress.demo.data import ImageData, MnistData
from lightning_selfcompress.demo.networks import LeNet5
from lightning_selfcompress.packing import Packed, packed_size
from lightning_selfcompress.quantize.parameters import quantized_parameters

TASKS: dict[str, tuple[type[pl.LightningModule], Callable[[Path], ImageData]]] = {
    "mnist": (LeNet5, MnistData),
    "cifar": (CifarNet, CifarData),
}


@torch.no_grad()
def test(model: pl.LightningModule, data: ImageData) -> tuple[float, Tensor]:
    """Accuracy on the test set in percent, and all logits."""
    model.eval()
    pairs = [(model(images), labels) for images, labels in data.test_dataloader()]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return 100 * (logits.argmax(1) == labels).float().mean().item(), logits


def order_0(codes: np.ndarray) -> float:
    """Bytes of codes at the entropy of their histogram."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    model_class, data_class = TASKS[options.task]
    data = data_class(options.data_dir)
    data.setup("test")
    model = load_from_checkpoint(model_class, options.checkpoint)
    name = {"name": model.hparams["name"]} if options.task == "cifar" else {}
    report, packed = size_report(model), Packed.of(model)
    accuracy, logits = test(model, data)
    print(f"compressed model: {accuracy:.2f}% of the test set, {report.weights_left:.2%} of the weights left")
    for floats in (torch.float32, torch.float16):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            nbytes = export(model, Path(folder) / "net.scnn", floats=floats)
            written = time.perf_counter()
            loaded = load(Path(folder) / "net.scnn", model_class(**name))
            read = time.perf_counter()
            size = (Path(folder) / "net.scnn").stat().st_size
        reported = size_report(model, floats=floats).nbytes
        found, other = test(loaded, data)
        print(f"\n{floats}: file {size:,} bytes, reported {reported:,}, returned {nbytes:,}")
        print(f"  after load: {found:.2f}%, logits equal to the bit: {torch.equal(logits, other)}", end="")
        print(f", largest difference {(logits - other).abs().max().item():.1e}")
        original = sum(p.spec.original_numel for p in quantized_parameters(model)) * 4 / 1e6
        print(
            f"  export {original / (written - start):.0f}, load {original / (read - written):.0f} MB/s of float weights"
        )
        rows = [t.codes.rows for t in packed.coded if t.codes is not None]
        codes, channels = [r.reshape(-1) for r in rows], sum(map(len, rows))
        by_layer, pooled = sum(map(order_0, codes)), order_0(np.concatenate(codes))
        for what, entropy in (("all codes together", pooled), ("layer by layer", by_layer)):
            bound = entropy + 2 * channels
            print(f"  {size / bound:.3f} times the order-0 entropy ({what}, {entropy:,.0f}) + 2 x {channels} channels")
    print(f"\nheader, structure and checksum: {packed_size(packed).structure_nbytes} bytes")


if __name__ == "__main__":
    main()
