"""Accuracy against the real bytes of a file: this package beside its peers, on one network, data, epochs and seeds.

    python benchmarks/sizes.py run mnist --data-dir path/to/data --epochs 20 --seeds 0 1 2
    python benchmarks/sizes.py run mnist --data-dir path/to/data --quick     # three epochs of few images: does it work?
    python benchmarks/sizes.py run mnist --data-dir path/to/data --network small --recipe '{"lr": 0.008}' --epochs 60
    python benchmarks/sizes.py table
    python benchmarks/sizes.py plot                                           # runs/sizes/sizes-mnist.png

Each method trains, or takes the float network, and writes a file by the best packing that it has. The file is loaded
into a new network, whose accuracy is measured on the validation split, and once on the test set. A line for each is
added to the results file; what is in it is not run again, and a training that was stopped goes on from its last epoch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch
from size_peers.brevitas_lsq import BrevitasLsq
from size_peers.diffq_peer import DiffQ
from size_peers.float_network import FloatNetwork
from size_peers.hgq_peer import Hgq
from size_peers.method import Method, Setting
from size_peers.networks import NETWORKS
from size_peers.nncodec_peer import NNCodec
from size_peers.post_training import PostTraining
from size_peers.recipe import RECIPES
from size_peers.results import DATA, Row, append, key, plot, read, table
from size_peers.selfcompress_peer import SelfCompress
from size_peers.task import TASKS, Task, accuracy, load_task
from size_peers.torch_pruning_peer import TorchPruning
from size_peers.training import Run

METHODS: tuple[Method, ...] = (
    FloatNetwork(),
    PostTraining(),
    NNCodec(),
    SelfCompress(),
    DiffQ(),
    BrevitasLsq(),
    TorchPruning(),
    Hgq(),
)
DEFAULT_EPOCHS = {"mnist": 20, "cifar": 30}


def missing(method: Method) -> list[str]:
    """The packages that a method needs and that are not installed, whatever their version."""
    found = {(d.metadata["Name"] or "").lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return [package for package in method.needs if package.split("==")[0] not in found]


def versions(method: Method) -> dict[str, str]:
    """Versions of the packages that took part."""
    names = ["torch", "lightning", "numpy", *(package.split("==")[0] for package in method.needs)]
    return {name: importlib.metadata.version(name) for name in names}


def hardware(device: torch.device) -> str:
    """The processor, and the accelerator if it took part."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}, {name}" if device.type == "cuda" else name


def measure(method: Method, setting: Setting, run: Run, on_cpu: Task) -> Row:
    """Trains, packs, loads and tests."""
    trained, seconds = method.train(run, setting)
    packed = Run(on_cpu, run.epochs, run.seed, run.folder)
    name = "-".join([method.name, *(f"{name}{value}" for name, value in setting.items()), f"seed{run.seed}"])
    path = run.checkpoint("").parent / "files" / f"{name}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    method.pack(trained, packed, setting, path)
    written = time.perf_counter()
    torch.manual_seed(-1)  # a loaded network owes nothing to the initial weights
    loaded = method.load(path, on_cpu, setting)
    return {
        "nbytes": path.stat().st_size,
        "accuracy": accuracy(loaded, on_cpu.test),
        "validation_accuracy": accuracy(loaded, on_cpu.val),
        "training_seconds": seconds,
        "packing_seconds": written - start,
        "versions": versions(method),
        "hardware": hardware(run.device),
        "parameters": sum(p.numel() for p in loaded.parameters()),
    }


def run_all(options: argparse.Namespace) -> None:
    """Measures all that is not in the results file yet."""
    torch.set_num_threads(options.threads)
    epochs = options.epochs or (3 if options.quick else DEFAULT_EPOCHS[options.task])
    done = {key(row) for row in read(options.results)}
    recipe = replace(RECIPES[options.task], **options.recipe)
    on_cpu = load_task(options.task, options.data_dir, quick=options.quick, network=options.network, recipe=recipe)
    task = on_cpu.to(torch.device(options.device))
    chosen = [method for method in METHODS if not options.methods or method.name in options.methods]
    for seed in options.seeds:
        folder = options.folder / ("checkpoints-quick" if options.quick else "checkpoints")
        run = Run(task, epochs, seed, folder)
        for method in chosen:
            if lacking := missing(method):
                print(f"{method.name}: left out. Install {' '.join(lacking)}.", flush=True)
                continue
            settings = method.settings(options.task) if options.task in method.tasks else []
            for setting in options.setting or (settings[1:2] if options.quick else settings):
                trained_how = {"network": on_cpu.network_name, "recipe": asdict(recipe), "epochs": epochs}
                row: Row = {"task": options.task, "method": method.name, "setting": setting, "seed": seed}
                row |= {**trained_how, "quick": options.quick}
                if key(row) in done:
                    continue
                try:
                    row |= measure(method, setting, run, on_cpu)
                except Exception:
                    print(f"{method.name} {setting} failed:\n{traceback.format_exc()}", flush=True)
                    continue
                append(options.results, row)
                print(
                    f"{method.name} {setting} seed {seed}: {row['nbytes']:,} bytes, {row['accuracy']:.2f}%, "
                    f"{row['training_seconds']:.1f} s of training",
                    flush=True,
                )


def main() -> None:
    """Runs, or shows what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sizes.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/sizes"), help="of checkpoints, files and pictures")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure what is not in the results file yet")
    runs.add_argument("task", choices=TASKS)
    runs.add_argument("--data-dir", type=Path, default=os.environ.get("SELFCOMPRESS_DATA"))
    runs.add_argument("--methods", nargs="+", choices=[method.name for method in METHODS])
    runs.add_argument("--setting", type=json.loads, action="append", help="instead of a method's own, as JSON")
    runs.add_argument("--network", choices=NETWORKS, help="instead of the task's own")
    runs.add_argument("--recipe", type=json.loads, default={}, help="what differs from the task's own, as JSON")
    runs.add_argument("--epochs", type=int)
    runs.add_argument("--seeds", type=int, nargs="+", default=[0])
    runs.add_argument("--device", default="cpu")
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--quick", action="store_true", help="few images, three epochs, one setting of each method")
    commands.add_parser("table", help="means and standard deviations over the seeds")
    commands.add_parser("plot", help="a picture for each task")
    options = parser.parse_args()
    if options.command == "run":
        if options.data_dir is not None:
            options.data_dir = Path(options.data_dir)
        run_all(options)
        return
    rows = read(options.results)
    if options.command == "table":
        print(table(rows))
        return
    for task in DATA:
        if any(row["task"] == task for row in rows):
            path = options.folder / f"sizes-{task}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            plot(rows, task, path)
            print(path)


if __name__ == "__main__":
    main()
