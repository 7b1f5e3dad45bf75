"""ResNets on CIFAR-10, in float and compressed, as the networks that other benchmarks measure.

    python benchmarks/cifar.py resnet18 --data-dir path/to/data           # both trainings, checkpoints under runs/
    python benchmarks/cifar.py resnet20 --data-dir path/to/data --epochs 20 --gamma 0.2

Reads ``cifar10-jpeg.tar.gz`` (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``), a JPEG copy: a little harder than the
original. Goes on where it was interrupted. ResNet-18 is the ImageNet one (7x7 stem with stride 2, max pooling, 512
channels at the end) on images of 32x32, so that a CPU can train it.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from step_time import Block
from torch import Tensor, nn

from lightning_selfcompress import SelfCompression, size_report
from lightning_selfcompress.demo.data import ImageData
from lightning_selfcompress.demo.networks import Classifier

DEPTHS = {
    "resnet18": (64, (64, 64, 128, 128, 256, 256, 512, 512)),
    "resnet20": (16, (16, 16, 16, 32, 32, 32, 64, 64, 64)),
}


def resnet(name: str) -> nn.Sequential:
    """A network of basic blocks; the resolution halves where the width doubles."""
    inputs, widths = DEPTHS[name]
    large = name == "resnet18"
    stem = [nn.Conv2d(3, inputs, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)]
    layers: list[nn.Module] = [
        *stem,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1) if large else nn.Identity(),
    ]
    for outputs in widths:
        layers.append(Block(inputs, outputs, 1 if outputs == inputs else 2))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class CifarNet(Classifier):
    """A ResNet trained with SGD, momentum and one cycle.

    Args:
        name: ``resnet18`` or ``resnet20``.
        lr: Highest learning rate.
    """

    def __init__(self, name: str = "resnet18", lr: float = 0.1) -> None:
        super().__init__(resnet(name), lr)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CifarData(ImageData):
    """CIFAR-10 from its JPEG copy, with random shifts and mirroring while training."""

    def __init__(self, folder: Path, batch_size: int = 128) -> None:
        super().__init__(batch_size, shift=4)
        self.folder = folder

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images ``(n, 3, 32, 32)`` standardized with the training set's mean and deviation, and labels."""
        archive = next(self.folder.rglob("cifar10-jpeg.tar.gz"))
        found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
        with tarfile.open(archive) as files:
            for member in files:
                parts = Path(member.name).parts
                if member.isfile() and member.name.endswith(".jpg"):
                    content = files.extractfile(member)
                    assert content is not None
                    image = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                    found[parts[-3]].append((parts[-2], image))
        names = sorted({label for label, _ in found["train"]})
        result = []
        for split in ("train", "test"):
            images = torch.from_numpy(np.stack([image for _, image in found[split]])).permute(0, 3, 1, 2).float() / 255
            result += [images, torch.tensor([names.index(label) for label, _ in found[split]])]
        mean, deviation = result[0].mean((0, 2, 3), keepdim=True), result[0].std((0, 2, 3), keepdim=True)
        return (result[0] - mean) / deviation, result[1], (result[2] - mean) / deviation, result[3]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Shifts, and mirrors half of the training images."""
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer is not None and self.trainer.training:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels


def train(
    name: str, data: CifarData, folder: Path, epochs: int, gamma: float, seed: int, until: float
) -> dict[str, float]:
    """One training, or the rest of it; the test accuracy of its last checkpoint."""
    pl.seed_everything(seed, verbose=False)
    model = CifarNet(name)
    last_step = until * epochs * (len(data.train_dataloader()))
    saved = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    last = folder / "last.ckpt"
    callback = SelfCompression(gamma=lambda step: gamma * (step < last_step), price="bits")
    compression = [callback] if gamma else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*compression, saved],
        logger=CSVLogger(folder, name="", version="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    (tested,) = trainer.test(model, datamodule=data, ckpt_path=last, verbose=False)
    report = size_report(model)
    return {
        "test accuracy, %": 100 * tested["test/accuracy"],
        "bits per weight": report.bits_per_weight if gamma else 32.0,
        "weights left": report.weights_left if gamma else 1.0,
        "bytes": report.nbytes,
    }


def main() -> None:
    """Trains in float and with compression."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=DEPTHS)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--gamma", type=float, default=0.2)
    parser.add_argument("--until", type=float, default=1.0, help="share of the training in which bits have a price")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("float", "compressed"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = CifarData(options.data_dir)
    data.setup("fit")
    for kind in (options.only,) if options.only else ("compressed", "float"):
        folder = options.folder / f"cifar-{options.net}" / kind
        gamma = options.gamma if kind == "compressed" else 0.0
        figures = train(options.net, data, folder, options.epochs, gamma, options.seed, options.until)
        print(kind, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
