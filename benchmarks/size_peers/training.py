"""The training that all methods share: the task's recipe, the same batches, a checkpoint after every epoch."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from size_peers.task import Task, accuracy, batches

Prepare = Callable[[torch.optim.Optimizer], None]


@dataclass(frozen=True)
class Run:
    """What the trainings of all methods have in common.

    Args:
        task: The network and its data.
        epochs: Epochs of each training.
        seed: Seed of the initial weights, of the batches and of all noise.
        folder: The folder for checkpoints.
    """

    task: Task
    epochs: int
    seed: int
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the networks are trained."""
        return self.task.train[0].device

    def network(self) -> nn.Module:
        """A new network, the same for every method, on the CPU."""
        torch.manual_seed(self.seed)
        return self.task.network()

    def checkpoint(self, name: str) -> Path:
        """The file of the training of that name."""
        changed = "-".join(f"{key}{value}" for key, value in self.task.recipe.changed().items())
        folder = f"{self.task.name}-{self.task.network_name}-{changed}-{self.epochs}-epochs"
        return self.folder / folder / f"{name}-seed{self.seed}.pt"

    def may_choose(self, epoch: int) -> bool:
        """Whether an epoch is among the last fifth, of which the validation split chooses the network."""
        return epoch >= self.epochs - max(1, self.epochs // 5)


def write(content: Any, path: Path) -> None:
    """Saves under a temporary name and renames, so that an interruption leaves the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def copied(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network, copied to the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in net.state_dict().items()}


@torch.no_grad()
def restore(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts values into the tensors that a network has, which its optimizer knows: Brevitas' loading makes new ones."""
    state = net.state_dict()
    if state.keys() != values.keys():
        raise ValueError(f"Expected values of {sorted(state)}, got {sorted(values)}. Delete the checkpoint.")
    for name, value in values.items():
        state[name].copy_(value)


def train(
    run: Run,
    name: str,
    net: nn.Module,
    *,
    prepare: Prepare = lambda optimizer: None,
    extra_loss: Callable[[], Tensor] | None = None,
) -> tuple[nn.Module, float]:
    """Trains a network, or the rest of it, and takes the epoch of the last fifth with the best validation accuracy.

    Args:
        run: The task, epochs and seed.
        name: The name of the training's checkpoint. A training that is done is read from it.
        net: The network before training.
        prepare: Called with the optimizer before the first step.
        extra_loss: What is added to the cross-entropy of each batch.

    Returns:
        The trained network, in eval mode on the CPU, and the seconds of the training.
    """
    net.to(run.device).train()
    optimizer = run.task.recipe.make_optimizer(net.parameters())
    prepare(optimizer)
    schedule = run.task.recipe.make_schedule(optimizer, run.epochs * run.task.steps)
    path = run.checkpoint(name)
    state: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "best": None, "validation": -1.0}
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["epoch"] < run.epochs:
            restore(net, state["net"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
    for epoch in range(state["epoch"], run.epochs):
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * run.seed + epoch)
        for images, labels in batches(run.task, run.seed, epoch):
            with run.task.recipe.autocast(run.device):
                loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            (loss if extra_loss is None else loss + extra_loss()).backward()
            optimizer.step()
            schedule.step()
        state["seconds"] += time.perf_counter() - start
        state["epoch"] = epoch + 1
        if run.may_choose(epoch):
            found = accuracy(net, run.task.val)
            if found >= state["validation"]:
                state.update(validation=found, best=copied(net))
        state.update(net=copied(net), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
        if epoch + 1 == run.epochs:
            for unneeded in ("net", "optimizer", "schedule"):
                del state[unneeded]
        write(state, path)
    restore(net, state["best"])
    return net.cpu().eval(), state["seconds"]


def trained_float(run: Run) -> tuple[nn.Module, float]:
    """The float network, trained once for all methods that begin with it."""
    return train(run, "float", run.network())
