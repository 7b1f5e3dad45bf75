"""The demo: the same network on real images, trained in float and trained with SelfCompression.

``DigitsNet`` and ``LeNet5`` are LightningModules as anyone writes them; they know nothing of compression.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_selfcompress.callback import SelfCompression
from lightning_selfcompress.demo.curve import draw_size_curve
from lightning_selfcompress.demo.data import DigitsData, ImageData, MnistData
from lightning_selfcompress.demo.networks import Classifier, DigitsNet, LeNet5
from lightning_selfcompress.errors import DataError
from lightning_selfcompress.size.report import size_report
from lightning_selfcompress.training.objective import Objective


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long and how hard it is compressed.

    Args:
        model: Makes the network.
        data: Makes the data from a folder, which may be None.
        epochs: Epochs of each of the two runs.
        gamma: Loss per bit of the average weight.
        threads: Threads of torch on a CPU; a tiny network is as fast on one, whatever else the machine does.
    """

    model: Callable[[], Classifier]
    data: Callable[[Path | None], ImageData]
    epochs: int
    gamma: float
    threads: int


TASKS = {
    "digits": Task(DigitsNet, lambda _: DigitsData(), epochs=90, gamma=0.07, threads=1),
    "mnist": Task(LeNet5, lambda folder: MnistData(folder), epochs=8, gamma=0.15, threads=torch.get_num_threads()),
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to, measured on the test set with the checkpoint read back.

    Args:
        accuracy: Share of test images classified right, in percent.
        bits_per_weight: Learned bits per original weight, 32 in float.
        nbytes: Bytes of the whole network.
        report: The size report as text.
        checkpoint: The file that was measured.
    """

    accuracy: float
    bits_per_weight: float
    nbytes: int
    report: str
    checkpoint: str


@dataclass(frozen=True)
class Settings:
    """What a run of the demo was started with; kept in its folder, so that it can be resumed.

    Args:
        data: ``"digits"`` or ``"mnist"``.
        data_dir: Folder with the data, for MNIST; None looks at ``SELFCOMPRESS_DATA``, then downloads.
        epochs: Epochs of each of the two trainings.
        gamma: Loss per bit of the average weight.
        seed: Seed of weights, shuffling and shifts.
    """

    data: str
    data_dir: str | None
    epochs: int
    gamma: float
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """The settings of the run in ``folder``.

        Raises:
            DataError: If no run was started there.
        """
        try:
            return cls(**json.loads((folder / "settings.json").read_text()))
        except FileNotFoundError:
            raise DataError(
                f"Expected a run of the demo in {folder}, found none. Start one without --resume."
            ) from None


def run_demo(settings: Settings, folder: Path, *, progress: bool = True) -> dict[str, Outcome]:
    """Trains in float, then with compression, and goes on where an interrupted run in ``folder`` stopped.

    Args:
        settings: What to train.
        folder: Gets checkpoints, TensorBoard runs, outcomes and the size curve.
        progress: Show progress bars.

    Returns:
        Outcome of the ``"float"`` and of the ``"compressed"`` network.

    Raises:
        DataError: If data is missing or damaged; nothing was written then.
        ValueError: If ``gamma`` is out of its range; nothing was written then.
    """
    task = TASKS[settings.data]
    SelfCompression(gamma=settings.gamma)  # fails here if it is going to
    data = task.data(Path(settings.data_dir) if settings.data_dir else None)
    data.setup("fit")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "settings.json", asdict(settings))
    outcomes = {}
    for name in ("float", "compressed"):
        done = folder / name / "outcome.json"
        if not done.exists():
            print(f"\n{name}: {task.model.__name__} on {settings.data}, {settings.epochs} epochs", flush=True)
            outcome = _train(settings, data, folder / name, compress=name == "compressed", progress=progress)
            _write_json(done, asdict(outcome))
        outcomes[name] = Outcome(**json.loads(done.read_text()))
    draw_size_curve(folder / "float", folder / "compressed", folder / "size_curve.png")
    return outcomes


def summary(outcomes: dict[str, Outcome], folder: Path) -> str:
    """What the demo prints at its end: the size report, both accuracies and where to look.

    Args:
        outcomes: As :func:`run_demo` returns them.
        folder: The run's folder.

    Returns:
        Text of several lines.
    """
    lines = ["", outcomes["compressed"].report, ""]
    for name, outcome in outcomes.items():
        lines.append(
            f"{name + ':':12}{outcome.accuracy:6.2f}% of the test set, {outcome.bits_per_weight:5.2f} bits per weight, "
            f"{outcome.nbytes:,} bytes  ({outcome.checkpoint})"
        )
    lines += [f"size curve: {folder / 'size_curve.png'}", f"TensorBoard: tensorboard --logdir {folder}"]
    return "\n".join(lines)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def _train(settings: Settings, data: ImageData, folder: Path, *, compress: bool, progress: bool) -> Outcome:
    """One training, or the rest of it, and its outcome from the best checkpoint read back."""
    pl.seed_everything(settings.seed, verbose=False)
    model = TASKS[settings.data].model()
    best = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="selfcompress/objective", save_last=True, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_epochs=settings.epochs,
        callbacks=[*([SelfCompression(gamma=settings.gamma)] if compress else []), Objective("val/loss"), best],
        logger=TensorBoardLogger(folder, name="", version=""),
        log_every_n_steps=10,
        # few candidates: among many epochs of a small validation split the luckiest is not the best
        check_val_every_n_epoch=max(1, settings.epochs // 15),
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    (tested,) = trainer.test(model, datamodule=data, ckpt_path=best.best_model_path, verbose=False)
    report = size_report(model)
    return Outcome(
        accuracy=100 * tested["test/accuracy"],
        bits_per_weight=report.bits_per_weight if compress else 32.0,
        nbytes=report.nbytes,
        report=str(report),
        checkpoint=best.best_model_path,
    )
