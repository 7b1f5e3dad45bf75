"""What the price costs of a training step: its evaluation and its addition to the gradients, against the whole step.

    python benchmarks/price_time.py                       # ResNet-18 for 32x32 images, batch 128
    python benchmarks/price_time.py --batch 32 --threads 1

Steps are taken by hand, and the two parts of the price are timed within each of them, so that what else the machine
does hits both; shares are medians over the steps.
"""

import argparse
import statistics
import time

import torch
from step_time import resnet18
from torch.nn import functional

from lightning_selfcompress import convert
from lightning_selfcompress.quantize.parameters import forget_quantized, quantized_layers
from lightning_selfcompress.size.prices import PRICES


def main() -> None:
    """Prints the share of each price in a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name, make in PRICES.items():
        net = resnet18()
        convert(net)
        price, optimizer = make(net), torch.optim.Adam(net.parameters())
        images, labels = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
        shares = []
        for _ in range(options.steps + 2):
            start = time.perf_counter()
            forget_quantized(quantized_layers(net))
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images), labels)
            before = time.perf_counter()
            pulls = price.pulls(0.1)
            priced = time.perf_counter() - before
            loss.backward()
            before = time.perf_counter()
            for pull in pulls:
                if pull.weight is not None:
                    pull.weight(1.0)
            priced += time.perf_counter() - before
            optimizer.step()
            shares.append(100 * priced / (time.perf_counter() - start))
        kept = sorted(shares[2:])
        print(f"{name}: {statistics.median(kept):.2f}% of a step (from {kept[0]:.2f} to {kept[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
