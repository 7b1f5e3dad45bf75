"""What each idea gains at equal bytes: four tasks, one size each, the packed file loaded back.

    python benchmarks/study.py run --data-dir path/to/data --seeds 0 1 2     # goes on where it was interrupted
    python benchmarks/study.py run --data-dir path/to/data --quick           # a few steps of each: does it work?
    python benchmarks/study.py table

Every run ends at the same number of bytes, so accuracy alone tells. The network is the one of the last step; its file
is loaded into a new network, which is judged on the test set. ``table`` prints the mean difference from ``base``, the
callback as it is, over the seeds that both have, with the standard deviation of the difference.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet
from size_peers.results import append, read
from study_tasks import TASKS, Classifier, Split, Task, load_task
from torch import Tensor, nn

from lightning_selfcompress import SelfCompression, Teacher, export, load
from lightning_selfcompress.budget import set_point
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.tables import table
from lightning_selfcompress.training import budget

RESULTS = Path(__file__).parent / "results" / "study.jsonl"


def zeros_of(p: QuantizedParameter) -> Tensor:
    """Where the codes of a weight are zero."""
    zeros: Tensor = getattr(p.layer, p.weight_name).detach() == 0
    return zeros


class HoldZeros(pl.Callback):
    """Holds the weights whose codes are zero at zero, from some share of the training on: none of them comes back.

    Args:
        begin: Share of the training.
        masks: What is held, instead: name of a weight -> where it is zero.
    """

    def __init__(self, begin: float = 0.7, masks: dict[str, Tensor] | None = None) -> None:
        self.begin, self.masks = begin, masks
        self._held: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step < self.begin * trainer.estimated_stepping_batches:
            return
        parameters = list(quantized_parameters(pl_module))
        if not self._held:
            for p in parameters:
                p.latent.data.masked_fill_(self.masks[p.name] if self.masks else zeros_of(p), 0.0)
        self._held = [(p.latent, p.latent.detach() == 0) for p in parameters]  # exactly zero: what is held, alone

    def on_train_batch_end(self, *_: Any) -> None:
        for latent, mask in self._held:
            latent.data.masked_fill_(mask, 0.0)


class OneExponent(pl.Callback):
    """Gives all channels of a layer the mean of their exponents, after each step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for p in quantized_parameters(pl_module):
            p.exponent.data.fill_(float(p.exponent.detach().mean()))


class Average(pl.Callback):
    """Puts the mean of the last steps' weights in their place before the last step's landing.

    Args:
        share: Share of the training, at its end, that is averaged.
    """

    def __init__(self, share: float = 0.05) -> None:
        self.share, self.sums, self.n = share, dict[int, Tensor](), 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        steps = trainer.estimated_stepping_batches
        if trainer.global_step < (1 - self.share) * steps:
            return
        latents = [p.latent for p in quantized_parameters(pl_module)]
        if not self.sums or any(self.sums[id(p)].shape != p.shape for p in latents):
            self.sums, self.n = {id(p): torch.zeros_like(p) for p in latents}, 0
        self.n += 1
        for p in latents:
            self.sums[id(p)] += p
            if trainer.global_step >= steps:
                p.data.copy_(self.sums[id(p)] / self.n)


@dataclass(frozen=True)
class Variant:
    """One way to compress.

    Args:
        what: What it changes, in a line.
        arguments: Arguments of the callback.
        callbacks: Makes callbacks that run before it.
        constants: ``(module, name, value)`` of the package's constants that are changed.
        decay: Decoupled weight decay of the user's optimizer.
        teacher: Whether the float network, trained before for as many epochs, teaches.
        lottery: ``"rewound"`` or ``"drawn anew"``: a second training of what survived a first one.
    """

    what: str
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callable[[], pl.Callback], ...] = ()
    constants: tuple[tuple[Any, str, Any], ...] = ()
    decay: float = 0.0
    teacher: bool = False
    lottery: str = ""


VARIANTS = {
    "base": Variant("the callback as it is"),
    "bits": Variant("the paper's price", {"price": "bits"}),
    "early": Variant("the size has fallen at 0.25 of the steps, not 0.45", constants=((set_point, "EARLIEST", 0.25),)),
    "late": Variant("the size has fallen at 0.7 of the steps", constants=((set_point, "EARLIEST", 0.7),)),
    "choice": Variant(
        "training ends 15% above the size, the landing's choice of codes takes it off",
        constants=((budget, "_ABOVE", 1.15), (set_point, "MARGIN", 0.15)),
    ),
    "within": Variant(
        "training ends 1.5% below the size, with nothing to land", constants=((budget, "_ABOVE", 0.985),)
    ),
    "teacher": Variant("the float network teaches", teacher=True),
    "zeros_held": Variant("codes that are zero after 0.7 of the steps stay zero", callbacks=(HoldZeros,)),
    "zeros_held_late": Variant("the same after 0.85 of the steps", callbacks=(partial(HoldZeros, 0.85),)),
    "one_exponent": Variant("one exponent a layer", callbacks=(OneExponent,)),
    "average": Variant("weights averaged over the last 5% of the steps", callbacks=(Average,)),
    "decay": Variant("decoupled weight decay of 0.01", decay=0.01),
    "slow_depths": Variant("depths and exponents at a third of their rate", {"bits_lr": 0.01}),
    "rewound": Variant("what survived, from its initial weights", lottery="rewound"),
    "drawn_anew": Variant("what survived, from other initial weights", lottery="drawn anew"),
}


@contextmanager
def changed(constants: tuple[tuple[Any, str, Any], ...]) -> Iterator[None]:
    """Changes constants of modules within this context."""
    before = [(module, name, getattr(module, name)) for module, name, _ in constants]
    for module, name, value in constants:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def fit(task: Task, seed: int, callbacks: list[pl.Callback], *, decay: float = 0.0, first: Any = None) -> Classifier:
    """Trains a network of a task.

    Args:
        task: The task.
        seed: The seed of weights and batches.
        callbacks: Callbacks of the Trainer.
        decay: Weight decay.
        first: Initial weights, instead of those of the seed.
    """
    pl.seed_everything(seed, verbose=False)
    module = Classifier(task, decay)
    if first is not None:
        module.load_state_dict(first)
    quiet: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        max_epochs=task.epochs, logger=False, accelerator="cpu", devices=1, callbacks=callbacks, **quiet
    )
    trainer.fit(module, task.batches(seed))
    return module.eval()


def compressed(task: Task, variant: Variant, seed: int) -> Classifier:
    """Trains a network as a variant says."""
    callbacks = [make() for make in variant.callbacks]
    arguments: dict[str, Any] = {"target_size": task.target, **variant.arguments}
    if variant.teacher:
        arguments["teacher"] = Teacher(fit(task, seed, []), outputs="net")
    first = None
    if variant.lottery:
        arguments["prune_every_n_epochs"] = 10**6  # widths stay, so that the survivors are found in new weights
        earlier = fit(task, seed, [SelfCompression(**arguments)])
        masks = {p.name: zeros_of(p) for p in quantized_parameters(earlier)}
        callbacks.append(HoldZeros(0.0, masks))
        pl.seed_everything(seed if variant.lottery == "rewound" else seed + 1000, verbose=False)
        first = Classifier(task, 0.0).state_dict()
    with changed(variant.constants):
        return fit(task, seed, [*callbacks, SelfCompression(**arguments)], decay=variant.decay, first=first)


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Share of right answers, in percent."""
    parts = list(zip(split[0].split(500), split[1].split(500), strict=True))
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / split[1].numel()


def measure(task: Task, variant: str, seed: int) -> dict[str, Any]:
    """Trains, packs, loads and tests."""
    start = time.time()
    if variant == "float":
        module = fit(task, seed, [])
        loaded, nbytes = module, 4 * sum(p.numel() for p in module.parameters())
    else:
        module = compressed(task, VARIANTS[variant], seed)
        with TemporaryDirectory() as folder:
            nbytes = int(export(module, Path(folder) / "net.scnn"))
            torch.manual_seed(-1)  # a loaded network owes nothing to the initial weights
            loaded = load(Path(folder) / "net.scnn", into=Classifier(task, 0.0)).eval()
    return {
        "nbytes": nbytes,
        "accuracy": accuracy(loaded.net, task.test),
        "validation_accuracy": accuracy(loaded.net, task.val),
        "seconds": round(time.time() - start, 1),
    }


def run(options: argparse.Namespace) -> None:
    """Runs what is not in the results file yet."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "machine": platform.machine(),
        "commit": commit,
    }
    tasks = {name: load_task(name, options.data_dir, quick=options.quick) for name in options.tasks}
    for seed in options.seeds:
        for variant in options.variants:
            for name, task in tasks.items():
                entry = {"task": name, "variant": variant, "seed": seed, "quick": options.quick}
                if any(all(e[k] == v for k, v in entry.items()) for e in read(options.results)):
                    continue
                entry |= measure(task, variant, seed) | about
                append(options.results, entry)
                print(json.dumps(entry), flush=True)


def show(options: argparse.Namespace) -> None:
    """Prints a table of accuracies and of differences from ``base``."""
    entries = [entry for entry in read(options.results) if entry["quick"] == options.quick]
    found = {(e["task"], e["variant"], e["seed"]): e for e in entries}
    tasks = [task for task in TASKS if any(e["task"] == task for e in entries)]
    rows = []
    for variant in ("float", *VARIANTS):
        cells = []
        for task in tasks:
            seeds = sorted(s for t, v, s in found if (t, v) == (task, variant) and (task, "base", s) in found)
            own = [found[task, variant, s]["accuracy"] for s in seeds]
            gains = [a - found[task, "base", s]["accuracy"] for a, s in zip(own, seeds, strict=True)]
            cells.append(_cell(own if variant == "base" else gains, signed=variant != "base"))
        if any(cells):
            rows.append((variant, *cells, VARIANTS[variant].what if variant in VARIANTS else "not compressed"))
    print(table(("variant", *tasks, "what it changes"), rows))


def _cell(values: list[float], *, signed: bool) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return (f"{mean:+.2f}" if signed else f"{mean:.2f}") + spread


def main() -> None:
    """Runs, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=("float", *VARIANTS), default=["float", *VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    options = parser.parse_args()
    run(options) if options.command == "run" else show(options)


if __name__ == "__main__":
    main()
