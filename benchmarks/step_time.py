"""Time and memory of a training step with SelfCompression against the same float network, in one run.

    python benchmarks/step_time.py                          # ResNet-18 for 32x32 images, batch 128, CPU, float32
    python benchmarks/step_time.py --device cuda --precision bf16-mixed --pairs 200 --block 50

A few steps of one network alternate with a few of the other, each in a Lightning Trainer with a logger, so that what
else the machine does hits both; the ratio is the median over the pairs. Memory is the peak of what tensors hold.
"""

import argparse
import copy
import gc
import statistics
import time
import warnings
from itertools import accumulate
from tempfile import TemporaryDirectory
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from quiet import quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.monitoring.scalars import log, total_scalars


class Block(nn.Module):
    """Basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 with a 3x3 stem for 32x32 images: 11.2 million weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(Block(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def lenet5() -> nn.Module:
    """LeNet-5 (20-50-500-10) on 32x32 images: nearly all its weights lie in one layer, the worst case for memory."""
    return nn.Sequential(
        nn.Conv2d(3, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1250, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class Classifier(pl.LightningModule):
    """An ordinary classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


NETWORKS = {"resnet18": resnet18, "lenet5": lenet5}


class Clock(pl.Callback):
    """Seconds of each training step, from before the first callback to after the last.

    Args:
        device: Where the network computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = self._now()

    def stop(self) -> None:
        """Ends the step; called by the last callback."""
        self.seconds.append(self._now() - self.started)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Stop(pl.Callback):
    """Last callback: stops the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.stop()


def train(model: pl.LightningModule, compress: bool, steps: int, options: argparse.Namespace) -> list[float]:
    """Seconds of each of ``steps`` training steps in a Trainer of their own, logging to TensorBoard as users do."""
    images = torch.randn(options.batch, 3, 32, 32)
    labels = torch.randint(10, (options.batch,))
    clock = Clock(torch.device(options.device))
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            precision=options.precision,
            callbacks=[clock, *([SelfCompression(gamma=0.05)] if compress else []), Stop(clock)],
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, DataLoader(cast(Any, [(images, labels)] * steps), batch_size=None))
    return clock.seconds


def logging_ms(model: pl.LightningModule) -> float:
    """Milliseconds of one logging of the totals, the median over ten, to a real TensorBoard writer."""
    times = []
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        for _ in range(10):
            started = time.perf_counter()
            log(trainer, total_scalars(size_report(model), 0.05, 0.0))
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def peak_nbytes(compress: bool, options: argparse.Namespace) -> int:
    """Peak of the memory that tensors hold over two training steps, model and optimizer included."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(Classifier(NETWORKS[options.network]()), compress, 2, options)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(Classifier(NETWORKS[options.network]()), compress, 2, options)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(max(accumulate(changes)))


def main() -> None:
    """Prints the medians, the median ratio of the pairs and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    parser.add_argument("--block", type=int, default=5, help="steps of one network before the other has its turn")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    plain = Classifier(NETWORKS[options.network]())
    compressed = copy.deepcopy(plain)
    seconds: tuple[list[float], list[float]] = ([], [])
    while len(seconds[0]) < options.pairs:
        for model, compress, times in ((plain, False, seconds[0]), (compressed, True, seconds[1])):
            times += train(model, compress, options.block + 1, options)[1:]  # the first makes the optimizer's state
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    extra = peak_nbytes(True, options) - peak_nbytes(False, options)
    print(f"{options.network}, batch {options.batch}, {options.device}, {options.precision}, torch {torch.__version__}")
    print(f"float      {statistics.median(seconds[0]) * 1e3:9.1f} ms a step (median of {len(ratios)})")
    print(f"compressed {statistics.median(seconds[1]) * 1e3:9.1f} ms a step")
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"ratio      {ratio:9.3f} (median of the pairs; quartiles {low:.3f} and {high:.3f})")
    logged = logging_ms(compressed)
    share = logged / (50 * statistics.median(seconds[1]) * 1e3)
    print(
        f"logging    {logged:9.1f} ms each time, {share:.2%} of a step's time at Lightning's default pace of 50 steps"
    )
    print(f"memory above float {extra:,} bytes = {extra / weights:.2f} times the weights' {weights:,} bytes")


if __name__ == "__main__":
    main()
