"""The tasks: a network, and images held in memory in three splits, with the batches that every method trains on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cifar import CifarData
from torch import Tensor, nn

from lightning_selfcompress.demo.data import ImageData, MnistData, random_shift
from size_peers.networks import NETWORKS
from size_peers.recipe import RECIPES, Recipe

Images = tuple[Tensor, Tensor]  # images (n, channels, height, width) and labels (n,)
TASKS = ("mnist", "cifar")


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        name: ``mnist`` or ``cifar``.
        network_name: The name of its network in ``NETWORKS``.
        recipe: How every method trains.
        train: Training images.
        val: Images of the validation split, a fixed tenth of the training set.
        test: Images of the test set.
    """

    name: str
    network_name: str
    recipe: Recipe
    train: Images
    val: Images
    test: Images

    def network(self) -> nn.Module:
        """A new network, with initial weights from torch's global generator, in the memory format of the batches."""
        net = NETWORKS[self.network_name]()
        for weight in net.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=self.recipe.memory_format)
        return net

    @property
    def example(self) -> Tensor:
        """Two images ``(2, channels, height, width)`` of the validation split."""
        return self.val[0][:2]

    @property
    def steps(self) -> int:
        """Training steps of an epoch; the last incomplete batch is left out."""
        return len(self.train[0]) // self.recipe.batch_size

    def to(self, device: torch.device) -> "Task":
        """The same task with its images on a device."""
        train, val, test = (
            (images.to(device), labels.to(device)) for images, labels in (self.train, self.val, self.test)
        )
        return replace(self, train=train, val=val, test=test)


def load_task(
    name: str, data_dir: Path | None, *, quick: bool, network: str | None = None, recipe: Recipe | None = None
) -> Task:
    """Reads the images of a task; ``quick`` takes few of them. Network and recipe are the task's own if not given.

    Raises:
        ValueError: If there is no task of that name, or no folder for CIFAR-10.
    """
    data: ImageData
    if name == "mnist":
        data = MnistData(data_dir)
    elif name == "cifar":
        if data_dir is None:
            raise ValueError("Expected --data-dir, a folder with cifar10-jpeg.tar.gz in it, for the task cifar.")
        data = CifarData(data_dir)
    else:
        raise ValueError(f"Expected a task of {', '.join(TASKS)}, got {name!r}.")
    data.setup("fit")
    limits = {"train": 4096, "val": 1000, "test": 1000} if quick else {}
    train, val, test = (
        thinned(images, labels, limits.get(split))
        for split in ("train", "val", "test")
        for images, labels in (data.splits[split].tensors,)
    )
    own = {"mnist": "lenet5", "cifar": "resnet20"}[name]
    return Task(name, network or own, recipe or RECIPES[name], train, val, test)


def thinned(images: Tensor, labels: Tensor, limit: int | None) -> Images:
    """At most ``limit`` images, evenly from the whole split: CIFAR-10's test set lies in the order of its classes."""
    step = max(1, len(labels) // limit) if limit else 1
    return images[::step][:limit].clone(), labels[::step][:limit].clone()


def batches(task: Task, seed: int, epoch: int) -> Iterator[Images]:
    """The training batches of an epoch, the same for every method: order, shifts and mirroring follow from the seed."""
    images, labels = task.train
    recipe = task.recipe
    devices = [images.device] if images.device.type == "cuda" else []
    random = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(images), generator=random)
    for step in range(task.steps):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size].to(images.device)
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
            batch = random_shift(images[chosen], recipe.shift)
            if recipe.mirror:
                mirrored = torch.rand(len(batch), device=batch.device) < 0.5
                batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        yield batch.contiguous(memory_format=recipe.memory_format), labels[chosen]


@torch.no_grad()
def accuracy(net: nn.Module, split: Images) -> float:
    """Share of images that a network classifies correctly, in percent."""
    training = net.training
    net.eval()
    right = sum(
        int((net(images).argmax(1) == labels).sum())
        for images, labels in zip(split[0].split(1000), split[1].split(1000), strict=True)
    )
    net.train(training)
    return 100 * right / len(split[1])
