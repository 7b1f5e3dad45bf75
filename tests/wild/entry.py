"""One model of the suite: how it is built, what it is fed, and the LightningModule around it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Entry:
    """One model of a family.

    Args:
        family: The package that the model is of.
        name: Name of the architecture.
        make: Returns the network, tiny, with random weights.
        batch: Returns a batch of random data.
        loss: Returns the loss of a network on a batch, and the network's outputs.
    """

    family: str
    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Loss

    @property
    def key(self) -> str:
        """What the results file calls the model."""
        return f"{self.family}/{self.name}"


class Wild(pl.LightningModule):
    """The LightningModule that a user would write around a network of another package."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = entry.make()
        self.loss_of = entry.loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss_of(self.net, batch)
        self.log("loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(self.net, batch)[0], batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)
