"""What removal costs, and what it gains.

    python benchmarks/removal_time.py watch      # a ResNet-18 step of batch 32, watched against not watched
    python benchmarks/removal_time.py plan       # seconds of a plan and removal on ResNet-18, dry run apart
    python benchmarks/removal_time.py epoch      # LeNet-5 on MNIST: an epoch of the smaller network against float

``epoch`` needs the checkpoint of a run: ``selfcompress demo --data mnist`` writes ``compressed/checkpoints/last.ckpt``.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step_time import resnet18
from torch import Tensor, nn

from lightning_selfcompress import convert, revert, size_report
from lightning_selfcompress.checkpoint import take_shapes
from lightning_selfcompress.demo import LeNet5
from lightning_selfcompress.dryrun import prove
from lightning_selfcompress.graph import Watcher, stored_tensors
from lightning_selfcompress.prune import plan_removal, remove


def seconds(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def training_step(net: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One ordinary step."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()


def watch(pairs: int) -> None:
    """Pairs of steps, the second one watched."""
    net = resnet18()
    convert(net)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def watched() -> None:  # as the callback does it: what training_step runs, not the backward pass
        optimizer.zero_grad()
        with Watcher(net) as watcher:
            loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        watcher.channels()

    training_step(net, images, labels, optimizer)
    ratios, extra = [], []
    for _ in range(pairs):
        plain = seconds(lambda: training_step(net, images, labels, optimizer))
        with_watcher = seconds(watched)
        ratios.append(with_watcher / plain)
        extra.append(with_watcher - plain)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"a watched step takes {statistics.median(ratios):.3f} times a step (quartiles {low:.3f}, {high:.3f}),")
    print(f"{1000 * statistics.median(extra):.0f} ms more; it is one step of the training")


def plan(repeats: int) -> None:
    """Half of ResNet-18's channels, planned and removed."""
    net = resnet18()
    convert(net)
    images = torch.randn(8, 3, 32, 32)
    with Watcher(net) as watcher:
        net(images)
    times: dict[str, list[float]] = {"channels": [], "plan": [], "removal": [], "dry run": []}
    channels = watcher.channels()
    half = channels.removable() & (np.random.default_rng(0).random(channels.count) < 0.5)
    tensors = stored_tensors(net)
    for slot in channels.slots:
        if slot.produces or slot.fades:
            tensors[slot.name].data.view(-1)[torch.from_numpy(half[channels.group[slot.atoms]])] = 0
    for _ in range(repeats):
        times["channels"].append(seconds(watcher.channels))
        times["plan"].append(seconds(lambda: plan_removal(net, channels)))
        planned, smaller = plan_removal(net, channels), copy.deepcopy(net)
        times["removal"].append(seconds(lambda: remove(smaller, planned.edits)))  # noqa: B023 - called at once
        times["dry run"].append(
            seconds(lambda: prove(net, channels, planned, lambda n, dtype: n(images.to(dtype))))  # noqa: B023
        )
    for name, values in times.items():
        print(f"{name + ':':10}{statistics.median(values):7.3f} s")


def epoch(pairs: int, checkpoint: Path) -> None:
    """Steps of the float LeNet-5, of the compressed one, and of the small one, in turns."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    small = LeNet5()
    convert(small)
    take_shapes(small, state)
    small.load_state_dict(state)
    left = size_report(small).weights_left
    plain = copy.deepcopy(small)
    revert(plain)
    nets = {"float": LeNet5(), "small": small, "small, plain": plain}
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    steps = {
        name: (net, torch.optim.Adam([p for n, p in net.named_parameters() if "bit_" not in n and "expo" not in n]))
        for name, net in nets.items()
    }
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(pairs):
        for name, (net, optimizer) in steps.items():
            chunk = [seconds(lambda: training_step(net, images, labels, optimizer)) for _ in range(20)]  # noqa: B023
            times[name].append(sum(chunk))
    for name in ("small", "small, plain"):
        ratio = statistics.median(a / b for a, b in zip(times[name], times["float"], strict=True))
        print(f"{name}: {ratio:.3f} times the float network's steps, at {left:.1%} of the weights")


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("watch", "plan", "epoch"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mnist-1/compressed/checkpoints/last.ckpt"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.what == "epoch":
        epoch(options.repeats, options.checkpoint)
    else:
        {"watch": watch, "plan": plan}[options.what](options.repeats)


if __name__ == "__main__":
    main()
