"""Trainings of two gloo processes, several of them one after the other in the same two.

Run as a script with names of TRAININGS and a folder: every process writes there what each training ended with.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from fits import NEVER, Widths, assert_only_living, fit
from lightning.pytorch.strategies import DDPStrategy
from networks import Lit
from torch import nn


class Sometimes(Lit):
    """A layer that only every other step uses."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.spare(self.net(batch[0])).square().mean() if batch_idx % 2 else loss


def train(every=1, make=Lit, **options):
    widths = Widths()
    strategy = DDPStrategy(**options)
    model, trainer = fit(every, widths, make=make, devices=2, strategy=strategy)
    assert_only_living(trainer, model)
    values = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    return {"losses": model.losses, "widths": widths.seen, "shapes": shapes, "values": values.tolist()}


TRAININGS = {
    "plain": train,
    "kept": partial(train, NEVER),
    "find_unused_parameters": partial(train, make=Sometimes, find_unused_parameters=True),
    "find_unused_parameters, kept": partial(train, NEVER, make=Sometimes, find_unused_parameters=True),
    "static_graph": partial(train, static_graph=True),
    "gradient_as_bucket_view": partial(train, gradient_as_bucket_view=True),
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
