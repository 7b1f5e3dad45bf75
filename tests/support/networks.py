"""LightningModules for the tests of whole fits, none of which knows of compression; and what is trained of them."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_selfcompress.quantize.parameters import learned_tensors


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes by gradients, by name: parameters, and depths and exponents, which are buffers."""
    learned = learned_tensors(model)
    return {**dict(model.named_parameters()), **{n: t for n, t in model.named_buffers() if id(t) in learned}}


def batches(n: int = 8, size: int = 8, *, dtype: torch.dtype = torch.float32) -> DataLoader:
    """``n`` batches of images (size, 1, 8, 8) and labels, the same ones at every call."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n * size, 1, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(4, (n * size,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def make_trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A Trainer of one epoch on the CPU that logs, saves and prints nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


class Regression(pl.LightningModule):
    """A network of sequences (n, 5, 4) with outputs (n, 5, 2), trained on the squared error; it has no layers yet."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def sequences(n: int = 60) -> list[tuple[Tensor, Tensor]]:
    """``n`` batches for a :class:`Regression`, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 2, generator=generator)) for _ in range(n)]


class Lit(pl.LightningModule):
    """A classifier; ``make_optimizer`` gets the module and returns what configure_optimizers shall."""

    def __init__(self, make_optimizer: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.net = small_net()
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is not None:
            return self.make_optimizer(self)
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Gan(pl.LightningModule):
    """Two networks, two optimizers, manual optimization; the generator's loss reaches the discriminator too."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1))
        self.noise: list[Tensor] = []

    def discriminator_loss(self, images: Tensor, noise: Tensor) -> Tensor:
        fake = self.generator(noise).detach()
        return self.discriminator(fake).mean() - self.discriminator(images.flatten(1)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        noise = torch.randn(len(batch[0]), 5, generator=torch.Generator().manual_seed(batch_idx))
        two.zero_grad()
        self.manual_backward(self.discriminator_loss(batch[0], noise))
        two.step()
        one.zero_grad()
        self.manual_backward(-self.discriminator(self.generator(noise)).mean())
        one.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=1e-3),
            torch.optim.SGD(self.discriminator.parameters(), lr=1e-3),
        ]
