"""This package: the callback in a Trainer, and its packed file."""

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet import quiet
from torch import Tensor, nn

from lightning_selfcompress import SelfCompression, export, load, load_from_checkpoint
from size_peers.method import Setting
from size_peers.task import Images, Task, batches
from size_peers.training import Run

SETTINGS: dict[str, list[Setting]] = {  # arguments of SelfCompression
    "mnist": [{"target_size": nbytes} for nbytes in (1000, 1520, 2000, 2953, 10_000)],
    "cifar": [{"target_size": nbytes} for nbytes in (15_000, 30_000, 70_000)],
}


class Epoch:
    """The batches of one epoch, as a data loader.

    Args:
        run: The task and the seed.
        epoch: The epoch, from 0.
    """

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.epoch = run, epoch

    def __len__(self) -> int:
        return self.run.task.steps

    def __iter__(self) -> Iterator[Images]:
        return batches(self.run.task, self.run.seed, self.epoch)


class Validation:
    """The images of the validation split, as a data loader.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return -(-len(self.task.val[1]) // 1000)

    def __iter__(self) -> Iterator[Images]:
        return zip(self.task.val[0].split(1000), self.task.val[1].split(1000), strict=True)


class Classifier(pl.LightningModule):
    """The network of a run with the optimizer, the schedule and the batches of all methods.

    Args:
        run: The task, the epochs and the seed.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.net = run, run.network()

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("validation", right + 1e-6 * self.current_epoch, batch_size=len(batch[1]))  # of equals, the last

    def configure_optimizers(self) -> Any:
        optimizer = self.run.task.recipe.make_optimizer(self.parameters())
        schedule = self.run.task.recipe.make_schedule(optimizer, self.run.epochs * self.run.task.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return Epoch(self.run, self.current_epoch)

    def val_dataloader(self) -> Any:
        return Validation(self.run.task)


class Chosen(ModelCheckpoint):
    """The epoch of the last fifth that does best on the validation split.

    Args:
        run: The epochs.
        folder: The folder of the checkpoint.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(folder, "chosen", monitor="validation", mode="max", enable_version_counter=False)
        self.run = run

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run.may_choose(trainer.current_epoch):
            super().on_validation_end(trainer, pl_module)


class Clock(pl.Callback):
    """Seconds of all training batches, of earlier runs of the same training too."""

    def __init__(self) -> None:
        self.seconds, self.started, self.ended = 0.0, 0.0, 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds += self.ended - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class SelfCompress:
    """SelfCompression from the start, no float network before it; float16 for what is not quantized."""

    name = "selfcompress"
    needs: Sequence[str] = ()
    tasks: Sequence[str] = ("mnist", "cifar")

    def settings(self, task: str) -> list[Setting]:
        return SETTINGS[task]

    def train(self, run: Run, setting: Setting) -> tuple[Any, float]:
        name = "-".join(f"{key}{value}" for key, value in setting.items())
        folder = run.checkpoint(f"selfcompress-{name}").with_suffix("")
        chosen, clock = Chosen(run, folder), Clock()
        last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        module = Classifier(run)
        quiet()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                max_epochs=run.epochs,
                accelerator="gpu" if run.device.type == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed" if run.task.recipe.bfloat16 else "32-true",
                callbacks=[SelfCompression(**setting), clock, chosen, last],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                reload_dataloaders_every_n_epochs=1,
            )
            path = folder / "last.ckpt"
            trainer.fit(module, ckpt_path=path if path.exists() else None, weights_only=False)
        kept = "last" if "target_size" in setting else "chosen"  # earlier networks of a budget are larger
        trained = load_from_checkpoint(
            Classifier, folder / f"{kept}.ckpt", map_location="cpu", weights_only=False, run=run
        )
        return trained.net, clock.seconds

    def pack(self, trained: Any, run: Run, setting: Setting, path: Path) -> None:
        export(trained.eval(), path, floats=torch.float16)

    def load(self, path: Path, task: Task, setting: Setting) -> nn.Module:
        return load(path, into=task.network()).eval()
