"""What *Choosing gamma, steps and learning rate* says, measured: steps, rates, ramps and a pretrained start.

    python benchmarks/choosing.py run --seeds 0 1     # goes on where it was interrupted
    python benchmarks/choosing.py table

The demo's network on scikit-learn's digits, judged on its test set by the packed file, loaded back. No model is chosen:
it is the network of the last step.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet
from size_peers.results import append, read

from lightning_selfcompress import SelfCompression, export, load
from lightning_selfcompress.demo import DigitsData, DigitsNet
from lightning_selfcompress.tables import table

RESULTS = Path(__file__).parent / "results" / "choosing.jsonl"
SIZE = {"target_size": 3000}
EPOCHS = 24
STEPS_IN_EPOCH = 35
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {"setting": {}},
    **{
        f"{epochs} epochs, bits_lr {rate}": {"setting": SIZE | {"bits_lr": rate}, "epochs": epochs}
        for epochs, rate in ((6, 0.03), (6, 0.06), (12, 0.03), (12, 0.06), (24, 0.03), (24, 0.06), (48, 0.03))
    },
    "pretrained, 6 epochs": {"setting": SIZE, "epochs": 6, "pretrained": True},
    "constant learning rate": {"setting": SIZE, "constant": True},
    **{f"gamma {gamma}": {"setting": {"gamma": gamma}} for gamma in (1.0, 0.3)},
    **{f"gamma {gamma}, ramp": {"setting": {"gamma": gamma}, "ramp": True} for gamma in (1.0, 0.3)},
}


class Ramp:
    """A gamma that rises in a straight line over the first steps."""

    def __init__(self, gamma: float, steps: int) -> None:
        self.gamma, self.steps = gamma, steps

    def __call__(self, step: int) -> float:
        """Returns gamma at a step."""
        return self.gamma * min(1.0, step / self.steps)


class ConstantRate(DigitsNet):
    """The demo's network at the learning rate of the start."""

    def configure_optimizers(self) -> Any:
        """Returns Adam without a schedule."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit(model: DigitsNet, data: DigitsData, epochs: int, callbacks: list[pl.Callback]) -> None:
    """Trains without files and without messages."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False
    )
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(model, train_dataloaders=data.train_dataloader())


def train(variant: dict[str, Any], seed: int, data: DigitsData) -> dict[str, Any]:
    """Trains one variant and returns its bytes and its accuracy after loading the file."""
    pl.seed_everything(seed, verbose=False)
    epochs, setting, start = variant.get("epochs", EPOCHS), dict(variant["setting"]), time.time()
    model = ConstantRate() if variant.get("constant") else DigitsNet()
    if variant.get("pretrained"):
        fit(model, data, EPOCHS, [])
    if variant.get("ramp"):
        setting["gamma"] = Ramp(setting["gamma"], STEPS_IN_EPOCH * epochs // 10)
    fit(model, data, epochs, [SelfCompression(**setting)] if setting else [])
    with TemporaryDirectory() as folder:
        nbytes = int(export(model, Path(folder) / "net.scnn"))
        loaded = load(Path(folder) / "net.scnn", into=DigitsNet()).eval()
    images, labels = data.splits["test"].tensors
    with torch.no_grad():
        accuracy = 100 * float((loaded(images).argmax(1) == labels).double().mean())
    return {"nbytes": nbytes, "accuracy": round(accuracy, 2), "seconds": round(time.time() - start, 1)}


def run(options: argparse.Namespace) -> None:
    """Runs what is not in the results file yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    data = DigitsData()
    data.setup("fit")
    done = {(entry["variant"], entry["seed"]) for entry in read(options.results)}
    for seed in options.seeds:
        for name, variant in VARIANTS.items():
            if (name, seed) not in done:
                entry = {"variant": name, "seed": seed} | train(variant, seed, data) | {"torch": torch.__version__}
                append(options.results, entry)
                print(json.dumps(entry), flush=True)


def show(options: argparse.Namespace) -> None:
    """Prints the table: means over the seeds, and the accuracies of all."""
    entries, rows = read(options.results), []
    for name in VARIANTS:
        own = [entry for entry in entries if entry["variant"] == name]
        if own:
            each = ", ".join(f"{entry['accuracy']:.2f}" for entry in own)
            nbytes, accuracy = mean(entry["nbytes"] for entry in own), mean(entry["accuracy"] for entry in own)
            rows.append((name, f"{nbytes:,.0f}", f"{accuracy:.2f}", each))
    print(table(("variant", "bytes", "accuracy", "seeds"), rows))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    {"run": run, "table": show}[options.command](options)


if __name__ == "__main__":
    main()
