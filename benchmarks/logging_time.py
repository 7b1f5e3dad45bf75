"""What all that is shown of a training costs: scalars, pictures, charts and the progress bar, in percent of an epoch.

    python benchmarks/logging_time.py --data-dir path/to/mnist
    python benchmarks/logging_time.py --data-dir path/to/mnist --threads 1 --epochs 5

The demo's LeNet-5 is trained on MNIST by the stock TensorBoardLogger at the Trainer's own pace. What the Monitor does
is timed within the same epochs, training and validation, so that what else the machine does hits both; the figure is
the median of the epochs after the first one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.demo import LeNet5, MnistData
from lightning_selfcompress.monitoring.monitor import Monitor

SHOWING = ("refresh", "end_batch", "end_epoch", "begin_validation", "end_validation")


class Stopwatch(pl.Callback):
    """Times epochs with their validation, and what the Monitor does in them."""

    def __init__(self) -> None:
        super().__init__()
        self.showing = self.start = 0.0
        self.shares: list[float] = []
        for name in SHOWING:
            setattr(Monitor, name, self.timed(getattr(Monitor, name)))

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a method that adds its time to that of showing."""

        def around(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            result = method(*args, **kwargs)
            self.showing += time.perf_counter() - before
            return result

        return around

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the epoch before, and begins the next."""
        self.take()
        self.showing, self.start = 0.0, time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the last epoch."""
        self.take()

    def take(self) -> None:
        """Takes note of an epoch's share."""
        if self.start:
            whole = time.perf_counter() - self.start
            self.shares.append(100 * self.showing / whole)
            print(f"\n{1000 * self.showing:.0f} ms of {whole:.1f} s: {self.shares[-1]:.2f}%", flush=True)


def main() -> None:
    """Prints the share of what is shown in an epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pl.seed_everything(0, verbose=False)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            callbacks=[SelfCompression(gamma=0.15), watch, TQDMProgressBar(refresh_rate=50)],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(LeNet5(), datamodule=MnistData(options.data_dir))
    kept = sorted(watch.shares[1:])
    print(f"showing: {statistics.median(kept):.2f}% of an epoch (from {kept[0]:.2f} to {kept[-1]:.2f})")


if __name__ == "__main__":
    main()
