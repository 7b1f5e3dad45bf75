"""Trainings of two gloo processes, several of them one after the other in the same two.

Run as a script with names of TRAININGS and a folder: every process writes there what each training ended with.
"""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from fits import NEVER, Kill, Widths, assert_only_living, data, fit
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from networks import Lit, batches, make_trainer, trained_tensors
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_selfcompress import ParetoCheckpoint, SelfCompression, convert
from lightning_selfcompress.activations.layers import activated_modules, exponents_of
from lightning_selfcompress.packing import Packed, to_bytes
from lightning_selfcompress.quantize.parameters import learned_tensors

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6 it needs a GPU
    fully_shard = None


class Sometimes(Lit):
    """A layer that only every other step uses."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.spare(self.net(batch[0])).square().mean() if batch_idx % 2 else loss


class Frozen(Lit):
    """A layer that is not trained; DDP waits for no gradient of its bit depths either."""

    def __init__(self):
        super().__init__()
        self.net[4].requires_grad_(False)


class Sharded(Lit):
    """FSDP2, each layer on its own and the rest together; in float64, which its strategy knows nothing of."""

    def __init__(self):
        super().__init__()
        self.double()

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].double(), batch[1]), batch_idx)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[4], self.net):
            fully_shard(layer, mesh=mesh)


class ShardedAfterConversion(Sharded):
    def __init__(self):
        super().__init__()
        convert(self)


class Synced(pl.Callback):
    """Counts the depths and exponents that DDP writes anew at every forward, and the batches after which it looked."""

    def __init__(self):
        self.count = self.looked = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        written = getattr(trainer.strategy.model, "modules_buffers", [])
        learned = {*learned_tensors(pl_module), *(id(exponents_of(part)) for _, part in activated_modules(pl_module))}
        self.count += sum(id(buffer) in learned for buffer in written)
        self.looked += isinstance(trainer.strategy.model, DistributedDataParallel)


def train(every=1, make=Lit, strategy=DDPStrategy, precision="64-true", *, board="", **options):
    """A training; ``board`` names the folder of a logger for TensorBoard."""
    widths, synced = Widths(), Synced()
    logger = board and TensorBoardLogger(sys.argv[1], name="", version=board)
    with warnings.catch_warnings(record=True) as said:
        settings = {"devices": 2, "strategy": strategy(**options), "precision": precision, "logger": logger or False}
        model, trainer = fit(every, widths, synced, make=make, **settings)
    assert_only_living(trainer, model)
    whole = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in trained_tensors(model).values())
    values = torch.cat([p.detach().flatten().double() for p in whole])
    shapes = {name: tuple(t.shape) for name, t in trained_tensors(model).items()}
    return {
        "losses": model.losses,
        "widths": widths.seen,
        "depths written by DDP": synced.count,
        "batches under DDP": synced.looked,
        "left behind": [name for name in vars(model) if name.startswith("_ddp")],
        "shapes": shapes,
        "values": values.tolist(),
        "event files": len(list(Path(sys.argv[1], board).glob("events.out*"))) if board else 0,
        "said": [str(w.message) for w in said if "SelfCompression" in str(w.message)],
    }


def refused(make, **options):
    try:
        train(make=make, strategy=ModelParallelStrategy, precision="32-true", **options)
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error)}
    raise AssertionError("it was not refused")


def budget():
    """A training that is to end within a size; the bytes of its file, and the event files that it wrote."""
    torch.manual_seed(1)
    model = Lit()
    compression = SelfCompression(target_size=1500)
    logger = TensorBoardLogger(sys.argv[1], name="", version="board")
    trainer = make_trainer(compression, max_epochs=4, devices=2, strategy=DDPStrategy(), logger=logger)
    trainer.fit(model, data(torch.float32, 120), batches(4))
    content = to_bytes(Packed.of(model))
    written = len(list(Path(sys.argv[1]).rglob("events.out*")))
    return {"file": content.hex(), "nbytes": len(content), "losses": model.losses, "event files": written}


def activations():
    """A training with activations in 8 bits; their exponents, and what DDP wrote anew."""
    torch.manual_seed(1)
    model, synced = Lit(), Synced()
    compression = SelfCompression(gamma=0.01, activations=8)
    trainer = make_trainer(compression, Kill(), synced, max_epochs=2, devices=2, strategy=DDPStrategy())
    trainer.fit(model, data(torch.float32, 60 * trainer.world_size))
    exponents = {path: exponents_of(part).tolist() for path, part in activated_modules(model)}
    widths = [model.net[0].out_channels, model.net[4].out_features]
    return {"exponents": exponents, "losses": model.losses, "written by DDP": synced.count, "widths": widths}


class Scored(Lit):
    """Logs another score in each process, of which each epoch's beats the last."""

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.trainer.current_epoch + 10 * self.trainer.global_rank))


def pareto():
    """A training that keeps its front of checkpoints; what both processes know of it, and the files."""
    kept = ParetoCheckpoint("score", dirpath=Path(sys.argv[1]) / "pareto")
    settings = {"max_epochs": 3, "devices": 2, "strategy": DDPStrategy(), "enable_checkpointing": True}
    trainer = make_trainer(SelfCompression(gamma=0.5, bits_lr=0.1), kept, **settings)
    trainer.fit(Scored(), data(torch.float32, 12), batches(4))
    trainer.strategy.barrier()
    files = sorted(path.name for path in Path(kept.dirpath).glob("*"))
    return {"front": [[p.metric, p.nbytes, p.step, Path(p.name).name] for p in kept.front], "files": files}


TRAININGS = {
    "activations": activations,
    "pareto": pareto,
    "budget": budget,
    "plain": train,
    "kept": partial(train, NEVER),
    "find_unused_parameters": partial(train, make=Sometimes, find_unused_parameters=True),
    "find_unused_parameters, kept": partial(train, NEVER, make=Sometimes, find_unused_parameters=True),
    "a frozen layer": partial(train, make=Frozen),
    "a frozen layer, kept": partial(train, NEVER, make=Frozen),
    "static_graph": partial(train, static_graph=True),
    "gradient_as_bucket_view": partial(train, gradient_as_bucket_view=True),
    "nothing removed": partial(train, 0),
}
if fully_shard is not None:
    TRAININGS |= {
        "tensor parallel": partial(refused, Sharded, data_parallel_size=1, tensor_parallel_size=2),
        "converted, then sharded": partial(
            refused, ShardedAfterConversion, data_parallel_size=2, tensor_parallel_size=1
        ),
        "FSDP2": partial(
            *(train, NEVER, Sharded, ModelParallelStrategy, "32-true"),
            board="sharded",
            data_parallel_size=2,
            tensor_parallel_size=1,
        ),
    }


def run_two(folder, *names):
    """What both processes ended with: training -> (rank 0, rank 1)."""
    mine = ("RANK", "WORLD_SIZE", "MASTER_", "NODE_RANK", "PL_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_RANK", *mine))} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}


if __name__ == "__main__":
    for training in sys.argv[2:]:
        result = TRAININGS[training]()
        (Path(sys.argv[1]) / f"{training}-{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
    torch.distributed.barrier()  # both have written what they end with
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is shutting down
