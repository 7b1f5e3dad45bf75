"""What removal costs, and what it gains.

    python benchmarks/removal_time.py watch      # a ResNet-18 step of batch 32, watched against not watched
    python benchmarks/removal_time.py plan       # seconds of a plan and removal on ResNet-18, dry run apart
    python benchmarks/removal_time.py epoch --repeats 5 --data-dir DATA   # LeNet-5 on MNIST, see below

``epoch`` measures whole epochs in a Lightning Trainer as the demo has it, validation included, checkpoints on disk not:
the float network without a callback, the compressed one going on with the callback from a checkpoint, and for
comparison the layers of the compressed one as plain layers without a callback. They take turns, so that what else the
machine does hits all. The checkpoint is that of a run: ``selfcompress demo --data mnist`` writes
``compressed/checkpoints/last.ckpt``. MNIST's folder is ``--data-dir`` or ``$SELFCOMPRESS_DATA``.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from quiet import quiet
from step_time import resnet18
from torch import Tensor, nn

from lightning_selfcompress import Objective, SelfCompression, convert, revert, size_report
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.demo.data import MnistData
from lightning_selfcompress.demo.networks import LeNet5
from lightning_selfcompress.demo.run import Settings
from lightning_selfcompress.files.checkpoint import take_shapes
from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.removal.trial import Replay
from lightning_selfcompress.tensors import stored_tensors


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
    """Pairs of steps of training and of validation, the second one of each watched."""
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

    @torch.inference_mode()
    def validated(watcher: Watcher | None = None) -> None:  # as Lightning runs a step of validation
        net.eval()
        with watcher or nullcontext():
            nn.functional.cross_entropy(net(images), labels)
        net.train()

    def validated_and_watched() -> None:
        watcher = Watcher(net)
        validated(watcher)
        watcher.channels()

    training_step(net, images, labels, optimizer)
    kinds = {
        "training": (lambda: training_step(net, images, labels, optimizer), watched),
        "validation": (validated, validated_and_watched),
    }
    for name, (plain, with_watcher) in kinds.items():
        ratios, extra = [], []
        for _ in range(pairs):
            without, with_it = seconds(plain), seconds(with_watcher)
            ratios.append(with_it / without)
            extra.append(with_it - without)
        low, _, high = statistics.quantiles(ratios, n=4)
        times, more = statistics.median(ratios), 1000 * statistics.median(extra)
        print(
            f"a watched step of {name}: {times:.3f} times a step (quartiles {low:.3f}, {high:.3f}), {more:.0f} ms more"
        )


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
            seconds(lambda: prove(net, channels, planned, [Replay(lambda n, dtype: n(images.to(dtype)))]))  # noqa: B023
        )
    for name, values in times.items():
        print(f"{name + ':':10}{statistics.median(values):7.3f} s")


class EpochClock(pl.Callback):
    """Seconds of the last epoch; the last of the callbacks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def smaller(state: dict[str, Tensor], *, plain: bool) -> LeNet5:
    """The compressed network of a checkpoint, with quantized or with plain layers."""
    net = LeNet5()
    convert(net)
    take_shapes(net, state)
    net.load_state_dict(state)
    if plain:
        revert(net)
    return net


def epoch_seconds(net: LeNet5, data: MnistData, checkpoint: Path | None = None, epoch: int = 0) -> float:
    """Seconds of one epoch, numbered ``epoch``; with SelfCompression where a checkpoint is gone on from."""
    clock = EpochClock()
    gamma = Settings.read(checkpoint.parents[2]).gamma if checkpoint is not None else 0.0
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epoch + 1,
            accelerator="cpu",
            callbacks=[
                *([SelfCompression(gamma=gamma)] if checkpoint is not None else []),
                Objective("val/loss"),
                clock,
            ],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(net, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    return clock.seconds


def epoch(repeats: int, checkpoint: Path, data_dir: Path | None) -> None:
    """Epochs of the float LeNet-5, of the compressed one, and of the compressed one's layers without quantizer."""
    saved = torch.load(checkpoint, weights_only=True)
    state, done = saved["state_dict"], saved["epoch"] + 1
    left = size_report(smaller(state, plain=False)).weights_left
    print(f"LeNet-5 on MNIST, {left:.1%} of the weights left, medians of {repeats}, seconds an epoch and times float")
    for batch in (64, 128, 256):
        data = MnistData(data_dir, batch_size=batch)
        times: dict[str, list[float]] = {"float": [], "compressed": [], "plain layers": []}
        for _ in range(repeats):
            times["float"].append(epoch_seconds(LeNet5(), data))
            times["compressed"].append(epoch_seconds(LeNet5(), data, checkpoint, done))
            times["plain layers"].append(epoch_seconds(smaller(state, plain=True), data))
        print(f"batch {batch:3}: float {statistics.median(times['float']):.2f} s", end="")
        for name in ("compressed", "plain layers"):
            ratios = [a / b for a, b in zip(times[name], times["float"], strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(
                f", {name} {statistics.median(times[name]):.2f} s = {statistics.median(ratios):.3f} ({spread})", end=""
            )
        print(flush=True)


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("watch", "plan", "epoch"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mnist-1/compressed/checkpoints/last.ckpt"))
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.what == "epoch":
        quiet()
        warnings.filterwarnings("ignore")
        epoch(options.repeats, options.checkpoint, options.data_dir)
    else:
        {"watch": watch, "plan": plan}[options.what](options.repeats)


if __name__ == "__main__":
    main()
