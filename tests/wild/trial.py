"""One model through a whole fit: converted, killed, shrunk, exported, loaded and resumed, with what was measured."""

import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from entry import Entry, Wild
from measures import Probe, difference, float_reasons, outputs
from torch.utils.data import DataLoader

from lightning_selfcompress import SelfCompression, export, load
from lightning_selfcompress.quantize.parameters import quantized_parameters

STEPS = 54  # of the first epoch: constants fade for fifty after the kill
AFTER = 2  # steps of the second epoch, after which what had to wait for the last epoch leaves

Row = dict[str, Any]


def batches(entry: Entry, n: int) -> DataLoader:
    """The same batches at every call."""
    torch.manual_seed(1)
    return DataLoader([entry.batch() for _ in range(n)], batch_size=None)


def make_trainer(precision: str, *callbacks: pl.Callback, epochs: int = 1, steps: int = -1) -> pl.Trainer:
    """A Trainer on one core that logs, saves and prints nothing."""
    return pl.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def precision_of(entry: Entry) -> str:
    """float64 where the float model can be trained in it, else float32."""
    try:
        make_trainer("64-true").fit(Wild(entry), batches(entry, 1), batches(entry, 1))
    except Exception:  # whatever the model's own code raises in float64
        make_trainer("32-true").fit(Wild(entry), batches(entry, 1), batches(entry, 1))
        return "32-true"
    return "64-true"


class Trial:
    """The stages of one model, each of which adds to its row; one that fails says so, and ends the trial.

    Args:
        entry: The model.
        folder: Where its files go.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.row: Row = {"model": entry.key}
        self.precision = "32-true"

    def run(self) -> Row:
        """Returns the row of the model."""
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for stage in (self._float, self._fit, self._load, self._resume):
                if not self._passes(stage):
                    break
        told = {str(w.message) for w in caught if str(w.message).startswith("SelfCompression")}
        self.row |= {"warnings": sorted(told), "seconds": round(time.process_time() - start, 1)}
        return self.row

    def _passes(self, stage: Callable[[], None]) -> bool:
        try:
            stage()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "lightning_selfcompress" in f.filename] or list(frames)
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            name = stage.__name__.strip("_")
            self.row["crashed"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]} ({place})"
            traceback.print_exc()
            return False
        return True

    def _double(self, value: Any) -> Any:
        return pl.plugins.precision.DoublePrecision().convert_input(value) if self.precision == "64-true" else value

    def _float(self) -> None:
        self.precision = precision_of(self.entry)
        parameters = sum(p.numel() for p in Wild(self.entry).parameters())
        self.row |= {"precision": self.precision, "parameters": parameters}

    def _fit(self) -> None:
        entry = self.entry
        compression = SelfCompression(gamma=0.01)
        (self.batch,) = (self._double(b) for b in batches(entry, 1))
        probe = Probe(compression, self.batch)
        self.module = Wild(entry)
        trainer = make_trainer(self.precision, probe, compression, epochs=2, steps=STEPS + AFTER)
        trainer.fit(self.module, batches(entry, STEPS), batches(entry, 1))
        shares = list(probe.shares(self.module))
        self.row |= {
            "quantized": round(probe.share, 4),
            "float": float_reasons(self.module, probe.said),
            "killed": sum(n for _, n, _ in shares),
            "left": sum(n for _, _, n in shares),
            "parts": probe.parts(self.module),
            "refused": dict(probe.refused.most_common()),
            "removal_difference": probe.worst,
        }
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def _fresh(self) -> Wild:
        module = Wild(self.entry)
        return module.double() if self.precision == "64-true" else module

    def _load(self) -> None:
        nbytes = export(self.module, self.folder / "net.scnn")
        expected = outputs(self.module, self.batch)
        plain = load(self.folder / "net.scnn", into=self._fresh())
        self.row |= {"nbytes": int(nbytes), "load_difference": difference(expected, outputs(plain, self.batch))}

    def _resume(self) -> None:
        entry, expected, batch = self.entry, outputs(self.module, self.batch), self.batch
        widths = {p.name: p.channels for p in quantized_parameters(self.module)}

        class Compare(pl.Callback):
            difference = float("inf")

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                assert widths == {p.name: p.channels for p in quantized_parameters(pl_module)}
                self.difference = difference(expected, outputs(pl_module, batch))

        compare, module = Compare(), self._fresh()
        trainer = make_trainer(self.precision, compare, SelfCompression(gamma=0.01), epochs=4, steps=STEPS + 2 * AFTER)
        trainer.fit(module, batches(entry, STEPS), batches(entry, 1), ckpt_path=self.folder / "last.ckpt")
        self.row["resume_difference"] = compare.difference


def tried(entry: Entry) -> Row:
    """Tries one model, and returns its row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        return Trial(entry, Path(folder)).run()
