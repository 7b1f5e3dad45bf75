"""The networks of the demo: ordinary LightningModules whose code does not depend on compression."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class Classifier(pl.LightningModule):
    """A classifier that is trained with cross-entropy, Adam and a learning rate that falls to zero.

    Args:
        net: A module that computes logits ``(n, 10)`` from images ``(n, 1, height, width)``.
        lr: Learning rate at the start.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(n, 10)`` of images ``(n, 1, height, width)``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns and logs the cross-entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the loss and the accuracy of a batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the loss and the accuracy of a batch of the test set."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """Returns Adam with a cosine schedule over the whole run."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log(f"{split}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
        self.log(f"{split}/loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels))


class DigitsNet(Classifier):
    """Two convolutions with BatchNorm and two linear layers for images of 8x8 pixels: 52,768 weights.

    Args:
        lr: Learning rate at the start.
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(256, 128),
                nn.ReLU(),
                nn.Linear(128, 10),
            ),
            lr,
        )


class LeNet5(Classifier):
    """LeNet-5 in its 20-50-500-10 form for images of 28x28 pixels: 430,500 weights.

    Args:
        lr: Learning rate at the start.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 20, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(20, 50, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(800, 500),
                nn.ReLU(),
                nn.Linear(500, 10),
            ),
            lr,
        )
