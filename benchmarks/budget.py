"""A size that is asked for, against a sweep of gamma: five architectures, three sizes each.

    python benchmarks/budget.py run --data-dir path/to/mnist       # goes on where it was interrupted
    python benchmarks/budget.py run --data-dir path/to/mnist --quick --results quick.jsonl
    python benchmarks/budget.py table

Networks are trained on the first 10,000 training images of MNIST and judged on its test set by the packed file, loaded
back. No model is chosen: it is the network of the last epoch. A sweep has six gammas, whose files are written with
vectors rounded to a byte a value, as those of a budget are; its accuracy at a size is read off a line in log bytes
between the two runs around that size.
"""

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet
from size_peers.results import append, read
from torch import Tensor, nn
from torch.nn import functional

from lightning_selfcompress import SelfCompression, export, load, size_report
from lightning_selfcompress.budget.vectors import round_vectors
from lightning_selfcompress.demo.data import MnistData
from lightning_selfcompress.tables import table

SHARES = ("8%", "4%", "2%")
GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def lenet() -> nn.Module:
    """Two convolutions and two linear layers, without normalization."""
    first = [nn.Conv2d(1, 12, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(384, 100), nn.ReLU(), nn.Linear(100, 10))


def conv_bn() -> nn.Module:
    """Three convolutions with batch normalization and a mean over positions."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


class Rows(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(images[:, 0])[0][:, -1])
        return out


class Patches(nn.Module):
    """A transformer of two blocks over 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(1, 48, 7, 7), nn.Linear(48, 10)
        self.places = nn.Embedding(16, 48)
        block = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.places.weight
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lenet,
    "conv_bn": conv_bn,
    "mlp": mlp,
    "lstm": Rows,
    "transformer": Patches,
}


class Classifier(pl.LightningModule):
    """Trains a network with Adam and a cosine."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Returns Adam with a rate that falls to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    name: str, seed: int, setting: dict[str, Any], data: MnistData, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains one network and returns its bytes and its accuracy after loading the file."""
    pl.seed_everything(seed, verbose=False)
    model, start = Classifier(NETWORKS[name]()), time.time()
    callbacks: list[pl.Callback] = [SelfCompression(**setting)] if setting else []
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(max_epochs=options.epochs, logger=False, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(model, train_dataloaders=data.train_dataloader())
    if "gamma" in setting:
        round_vectors(model)
    images, labels = data.splits["test"].tensors
    with TemporaryDirectory() as folder:
        nbytes = int(export(model, Path(folder) / "net.scnn"))
        loaded = load(Path(folder) / "net.scnn", into=Classifier(NETWORKS[name]())).eval()
    with torch.no_grad():
        parts = zip(images.split(1000), labels.split(1000), strict=True)
        right = sum(int((loaded.net(x).argmax(1) == y).sum()) for x, y in parts)
    return {
        "nbytes": nbytes,
        "target": callbacks[0]._budget.target if "target_size" in setting else None,  # type: ignore[attr-defined]
        "accuracy": 100 * right / len(labels),
        "float_nbytes": size_report(model).float_nbytes,
        "seconds": round(time.time() - start, 1),
    }


def run(options: argparse.Namespace) -> None:
    """Runs what is not in the results file yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    data = MnistData(options.data_dir, batch_size=64)
    data.setup("fit")
    images, labels = data.splits["train"].tensors
    data.splits = {
        **data.splits,
        "train": torch.utils.data.TensorDataset(images[: options.images], labels[: options.images]),
    }
    settings: list[dict[str, Any]] = [{}, *({"target_size": s} for s in SHARES), *({"gamma": g} for g in GAMMAS)]
    done = {_key(entry) for entry in read(options.results)}
    for setting, seed, name in product(settings, range(options.seeds), options.networks):
        entry = {"network": name, "seed": seed, "setting": setting}
        entry |= {"epochs": options.epochs, "images": options.images}
        if _key(entry) in done:
            continue
        entry |= train(name, seed, setting, data, options)
        entry |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        append(options.results, entry)
        print(json.dumps(entry), flush=True)


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry[name] for name in ("network", "seed", "setting", "epochs", "images")])


def at_size(points: list[tuple[int, float]], nbytes: int) -> float:
    """Returns the accuracy of a sweep at a size, on lines in log bytes; the nearest run's beyond its ends."""
    points = sorted(points)
    for (small, low), (large, high) in pairwise(points):
        if small <= nbytes <= large:
            share = math.log(nbytes / small) / max(math.log(large / small), 1e-9)
            return low + share * (high - low)
    return points[0][1] if nbytes < points[0][0] else points[-1][1]


def show(options: argparse.Namespace) -> None:
    """Prints the table."""
    entries, rows = read(options.results), []
    for entry in entries:
        if "target_size" not in entry["setting"]:
            continue
        like = [e for e in entries if all(e[k] == entry[k] for k in ("network", "seed", "epochs", "images"))]
        sweep = [(e["nbytes"], e["accuracy"]) for e in like if "gamma" in e["setting"]]
        floats = [f"{e['accuracy']:.2f}" for e in like if not e["setting"]]
        best = f"{at_size(sweep, entry['nbytes']):.2f}" if sweep else ""
        share = f"{entry['nbytes'] / entry['target']:.3f}"
        sizes = (f"{entry['target']:,}", f"{entry['nbytes']:,}", share)
        seconds = f"{entry['seconds']:.0f}"
        rows.append((entry["network"], str(entry["seed"]), *sizes, f"{entry['accuracy']:.2f}", best, *floats, seconds))
    print(table(("network", "seed", "target", "bytes", "share", "accuracy", "sweep", "float", "seconds"), rows))


def main() -> None:
    """Runs, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "budget.jsonl")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 epochs of 1,000 images")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.images = 3, 1000
    run(options) if options.command == "run" else show(options)


if __name__ == "__main__":
    main()
