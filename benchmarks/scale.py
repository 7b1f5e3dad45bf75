"""How the costs of measuring and removing grow with a network: many rows in one layer, and many layers.

    python benchmarks/scale.py                       # a few minutes
    python benchmarks/scale.py --what layers --layers 500 1000 --repeats 5

``rows`` is an embedding of n rows with 64 channels, every fourth one dead, the mean over the tokens and a linear layer.
``layers`` is n times a linear layer of 8 by 8 without bias and a ReLU, with one dead channel each. A line shows the
median seconds of each part at one n; the ratio line divides those of the largest n by those of the smallest. A cost in
proportion to the network has the ratio of the n; one with a larger ratio grows faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_selfcompress import convert, size_report
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.removal import plan_removal, prove
from lightning_selfcompress.removal.trial import Replay
from lightning_selfcompress.size.coupling import couple
from lightning_selfcompress.tables import table


class MeanOfTokens(nn.Module):
    """An embedding, the mean over the tokens and a linear layer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        head: Tensor = self.head(self.embedding(tokens).mean(1))
        return head


def chain(layers: int) -> nn.Module:
    """Narrow linear layers, one after the other, and a classifier."""
    pairs = [m for _ in range(layers) for m in (nn.Linear(8, 8, bias=False), nn.ReLU())]
    return nn.Sequential(*pairs, nn.Linear(8, 2))


def with_rows(n: int) -> tuple[nn.Module, Tensor]:
    """A network with an embedding of n rows, every fourth channel of it dead, and its inputs."""
    net = MeanOfTokens(n)
    convert(net)
    with torch.no_grad():
        next(quantized_parameters(net)).raw_depth[::4] = -1
    return net, torch.randint(n, (5, 8))


def with_layers(n: int) -> tuple[nn.Module, Tensor]:
    """A network with n layers of which one channel each is dead, and its inputs."""
    net = chain(n)
    convert(net)
    with torch.no_grad():
        for p in quantized_parameters(net):
            if p.channels == 8:
                p.raw_depth[0] = -1
    return net, torch.randn(5, 8)


def seconds(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(net: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Seconds of each part for one network."""

    def step(some: nn.Module, dtype: torch.dtype | None) -> Tensor:
        out: Tensor = some(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        return out

    watcher = Watcher(net)

    def watch() -> None:
        with watcher:
            watcher.pin_outputs(net(inputs), "the output")

    found = {"watch": seconds(watch)}
    channels = watcher.channels()
    found["removable"] = seconds(channels.removable)
    found["couple"] = seconds(lambda: couple(net, channels))
    found["plan"] = seconds(lambda: plan_removal(net, channels))
    plan = plan_removal(net, channels)
    found["prove"] = seconds(lambda: prove(net, channels, plan, [Replay(step)]))
    found["exact size"] = seconds(lambda: size_report(net))
    found["estimate"] = seconds(lambda: size_report(net, exact=False))
    return found


def medians(make: Callable[[int], tuple[nn.Module, Tensor]], n: int, repeats: int) -> dict[str, float]:
    """Median seconds of each part over networks made anew."""
    runs = [measure(*make(n)) for _ in range(repeats)]
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def lines(what: str, found: Sequence[tuple[int, dict[str, float]]]) -> list[tuple[str, ...]]:
    """The lines of the table for one sort of network: each n, and the ratio of the last to the first."""
    (small, first), (large, last) = found[0], found[-1]
    rows = [(f"{n:,} {what}", *(f"{value:.4f}" for value in of_part.values())) for n, of_part in found]
    return [*rows, (f"ratio, n {large / small:.3g}", *(f"{last[part] / first[part]:.2f}" for part in first))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("rows", "layers"), nargs="+", default=("rows", "layers"))
    parser.add_argument("--rows", type=int, nargs="+", default=(250_000, 1_000_000))
    parser.add_argument("--layers", type=int, nargs="+", default=(500, 2_000))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    measure(*with_layers(2))  # the first calls of everything
    body: list[tuple[str, ...]] = []
    parts: tuple[str, ...] = ()
    for what in options.what:
        sizes, make = (options.rows, with_rows) if what == "rows" else (options.layers, with_layers)
        found = [(n, medians(make, n, options.repeats)) for n in sorted(sizes)]
        parts = tuple(found[0][1])
        body += lines(what, found)
    print(f"seconds, medians of {options.repeats}, {options.threads} threads, torch {torch.__version__}")
    print(table(("network", *parts), body))


if __name__ == "__main__":
    main()
