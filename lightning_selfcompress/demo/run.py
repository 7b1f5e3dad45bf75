"""The run of the demo, which trains the same network on real images in float and with SelfCompression.

``DigitsNet`` and ``LeNet5`` are ordinary LightningModules whose code does not depend on compression.
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
from lightning_selfcompress.monitoring.objective import Objective
from lightning_selfcompress.size.report import size_report


@dataclass(frozen=True)
class Task:
    """A network, its data, and the settings of its compression.

    Args:
        model: A function that makes the network.
        data: A function that makes the data module from a folder, which may be None.
        epochs: Epochs of each of the two trainings.
        gamma: Loss per bit of the average weight.
        threads: Number of torch's threads on a CPU. A tiny network is as fast with one thread, even on a busy machine.
    """

    model: Callable[[], Classifier]
    data: Callable[[Path | None], ImageData]
    epochs: int
    gamma: float
    threads: int


TASKS = {
    "digits": Task(DigitsNet, lambda _: DigitsData(), epochs=90, gamma=0.2, threads=1),
    "mnist": Task(LeNet5, lambda folder: MnistData(folder), epochs=8, gamma=0.5, threads=torch.get_num_threads()),
}


@dataclass(frozen=True)
class Outcome:
    """The result of one training, measured on the test set with the best checkpoint.

    Args:
        accuracy: Share of the test images that are classified correctly, in percent.
        bits_per_weight: Learned bits per original weight; 32 for the float network.
        nbytes: Bytes of the whole network in a packed file.
        report: The size report as text.
        checkpoint: Path of the best checkpoint.
    """

    accuracy: float
    bits_per_weight: float
    nbytes: int
    report: str
    checkpoint: str


@dataclass(frozen=True)
class Settings:
    """The settings of a run of the demo, which are stored in its folder so that the run can be resumed.

    Args:
        data: ``"digits"`` or ``"mnist"``.
        data_dir: Folder with the files of MNIST. None takes the folder in ``SELFCOMPRESS_DATA``, or downloads them.
        epochs: Epochs of each of the two trainings.
        gamma: Loss per bit of the average weight.
        seed: Seed of the initial weights, the shuffling and the shifts.
    """

    data: str
    data_dir: str | None
    epochs: int
    gamma: float
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Reads the settings of the run in ``folder``.

        Raises:
            DataError: If the folder has no settings of a run.
        """
        try:
            return cls(**json.loads((folder / "settings.json").read_text()))
        except FileNotFoundError:
            raise DataError(
                f"Expected a run of the demo in {folder}, found none. Start one without --resume."
            ) from None


def run_demo(settings: Settings, folder: Path, *, progress: bool = True) -> dict[str, Outcome]:
    """Trains in float and then with compression; continues an interrupted run in ``folder``.

    Args:
        settings: The settings of the run.
        folder: The folder for checkpoints, TensorBoard runs, outcomes and the size curve.
        progress: Whether progress bars are shown.

    Returns:
        The outcomes of the ``"float"`` and the ``"compressed"`` network.

    Raises:
        DataError: If data is missing or damaged; nothing is written to ``folder`` then.
        ValueError: If ``gamma`` is out of its range; nothing is written to ``folder`` then.
    """
    task = TASKS[settings.data]
    SelfCompression(gamma=settings.gamma)  # raises the ValueError before anything is written
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
    """Returns the text that the demo prints at its end: the size report, both accuracies, and the paths of the files.

    Args:
        outcomes: The outcomes that :func:`run_demo` returned.
        folder: The folder of the run.
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
    """Writes a JSON file completely or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def _train(settings: Settings, data: ImageData, folder: Path, *, compress: bool, progress: bool) -> Outcome:
    """Runs one training, or the rest of an interrupted one, and returns the outcome of the best checkpoint."""
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
        # with many validations on a small split, the best result would be a matter of luck
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
