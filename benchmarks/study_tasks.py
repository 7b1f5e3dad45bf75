"""The tasks of the study: small enough for a minute on one core, of four kinds."""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from budget import lenet
from cifar import CifarData
from step_time import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_selfcompress.demo.data import MnistData

Split = tuple[Tensor, Tensor]  # inputs, and what is to be said of each
CONTEXT = 64  # characters that the transformer sees


@dataclass(frozen=True)
class Task:
    """A network, its data, and the size at which it is to end.

    Args:
        network: Makes the network; its output has the classes in dimension 1.
        train: Training samples.
        val: Samples of the validation split.
        test: Samples of the test set.
        epochs: Epochs of each training.
        batch_size: Samples in a batch.
        target: The ``target_size``.
        lr: Learning rate of Adam at the start; it falls along a cosine.
    """

    network: Callable[[], nn.Module]
    train: Split
    val: Split
    test: Split
    epochs: int
    batch_size: int
    target: str
    lr: float = 2e-3

    def batches(self, seed: int) -> DataLoader[Any]:
        """Returns the training batches, in an order that follows from the seed."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(TensorDataset(*self.train), self.batch_size, shuffle=True, generator=order, drop_last=True)


class Classifier(pl.LightningModule):
    """Trains the network of a task with Adam and a cosine.

    Args:
        task: The task.
        decay: Decoupled weight decay.
    """

    def __init__(self, task: Task, decay: float) -> None:
        super().__init__()
        self.net, self.lr, self.decay = task.network(), task.lr, decay

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and a rate that falls to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def resnet8() -> nn.Module:
    """Three basic blocks of 16, 32 and 64 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        layers.append(Block(inputs, outputs, 1 if inputs == outputs else 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def rows_of_an_image() -> nn.Module:
    """Three one-dimensional convolutions along the rows of an image, whose columns are the channels."""
    layers: list[nn.Module] = [nn.Flatten(1, 2)]
    for inputs, outputs in ((28, 48), (48, 64), (64, 96)):
        layers += [nn.Conv1d(inputs, outputs, 5, 2, 2, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(96, 10))


class Characters(nn.Module):
    """A causal transformer of two blocks over characters.

    Args:
        symbols: Number of different characters.
    """

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(symbols, 64), nn.Embedding(CONTEXT, 64)
        block = nn.TransformerEncoderLayer(64, 4, 192, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Returns logits ``(n, symbols, CONTEXT)`` of the next characters of ``(n, CONTEXT)`` characters."""
        out = self.blocks(self.embed(text) + self.places.weight, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(out).transpose(1, 2)
        return logits


def _mnist(data_dir: Path | None) -> tuple[Split, Split, Split]:
    data = MnistData(data_dir)
    data.setup("fit")
    train, val, test = (data.splits[name].tensors for name in ("train", "val", "test"))
    return (train[0][:10_000], train[1][:10_000]), (val[0], val[1]), (test[0], test[1])


def _cifar(data_dir: Path | None) -> tuple[Split, Split, Split]:
    assert data_dir is not None
    data = CifarData(data_dir)
    data.setup("fit")
    train, val, test = (data.splits[name].tensors for name in ("train", "val", "test"))
    return (train[0][::5], train[1][::5]), (val[0][::2], val[1][::2]), (test[0][::2], test[1][::2])


def _text() -> tuple[Split, Split, Split, int]:
    """The source text of Python's library of asynchronous input and output: the alphabet, and windows of it."""
    folder = Path(sysconfig.get_path("stdlib")) / "asyncio"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(character) for character in text])
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    splits = [windows[[i % 10 not in (8, 9) for i in range(len(windows))]], windows[8::10], windows[9::10]]
    train, val, test = ((w[:, :-1], w[:, 1:]) for w in splits)
    return train, val, test, len(symbols)


def load_task(name: str, data_dir: Path | None, *, quick: bool) -> Task:
    """Reads the samples of a task; ``quick`` takes few of them, and three epochs.

    Raises:
        ValueError: If there is no task of that name.
    """
    if name == "lenet":
        task = Task(lenet, *_mnist(data_dir), 15, 64, "0.7%")
    elif name == "resnet8":
        task = Task(resnet8, *_cifar(data_dir), 10, 64, "3%")
    elif name == "rows":
        task = Task(rows_of_an_image, *_mnist(data_dir), 15, 64, "1.5%")
    elif name == "text":
        train, val, test, symbols = _text()
        task = Task(lambda: Characters(symbols), train, val, test, 10, 32, "4%")
    else:
        raise ValueError(f"Expected a task of {', '.join(TASKS)}, got {name!r}.")
    if not quick:
        return task
    train, val, test = ((split[0][:2560], split[1][:2560]) for split in (task.train, task.val, task.test))
    return replace(task, train=train, val=val, test=test, epochs=3)


TASKS = ("lenet", "resnet8", "rows", "text")
