"""Removal from a network that FSDP2 shards over processes, beside the same network on one device.

Run as a script with a rank, a number of processes and a folder: every process writes there what it ended with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from lightning_selfcompress import convert
from lightning_selfcompress.channels import Watcher
from lightning_selfcompress.removal import plan_removal, remove, shrink_optimizer

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
except ImportError:  # before torch 2.6 it needs a GPU
    fully_shard = None

STEPS, REMOVALS, EXAMPLES = 12, (2, 5, 8), 4
DEAD = {2: ([1], [0], [2]), 5: ([0, 3], [1], [0]), 8: ([2], [0, 1], [1])}  # rows of layers 0, 2 and 5, at a removal
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 7, 3, bias=False), nn.ReLU(), nn.Conv2d(7, 5, 3, bias=False), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(5 * 16, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)),
    )


def sharded(mesh):
    """Two layers on their own, the rest together."""
    net = network()
    for layer in (net[0], net[5], net):
        fully_shard(layer, mesh=mesh)
    return net


def removed(one, many, optimizers, step):
    """A removal from both networks, planned on the one that is whole; whether gradients went along."""
    for net in (one, many):
        for layer, rows in zip((0, 2, 5), DEAD[step], strict=True):
            net[layer].bit_depth.data[rows] = 0
    x = torch.ones(2, 1, 8, 8)
    watcher = Watcher(one)
    with watcher:
        watcher.pin_outputs(one(x), "returned")
    plan = plan_removal(one, watcher.channels())
    with torch.no_grad():
        many(x)  # after this the root of FSDP2 holds whole parameters
    for net, optimizer in zip((one, many), optimizers, strict=True):
        shrink_optimizer(optimizer, remove(net, plan.edits))
    pairs = zip(one.parameters(), many.parameters(), strict=True)
    return max(largest(a.grad, b.grad) for a, b in pairs)


def largest(whole, shard):
    return (whole - shard.full_tensor()).abs().max().item()


def stepped(net, optimizer, x, y):
    optimizer.zero_grad()
    loss = cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach().clone()


def refused(net, edits_of):
    """What is said where a removal is refused, and whether the shapes stayed."""
    before = [tuple(p.shape) for p in net.parameters()]
    try:
        remove(net, edits_of)
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error), "unchanged": before == [tuple(p.shape) for p in net.parameters()]}
    raise AssertionError("it was not refused")


def unreduced(mesh):
    """A removal between two batches whose gradients are accumulated before they are reduced."""
    net = sharded(mesh)
    convert(net)
    net.set_requires_gradient_sync(False)
    net(torch.ones(2, 1, 8, 8)).sum().backward()
    return refused(net, [])


def sharded_elsewhere(mesh):
    """A removal from a parameter that somebody has sharded without FSDP2."""
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(distribute_tensor(net[0].weight.detach(), mesh))
    return refused(net, [])


def train(mesh, optimizer):
    """Both networks see the same batches; the sharded one in parts."""
    rank, count = dist.get_rank(), dist.get_world_size()
    one, many = network(), sharded(mesh)
    convert(one), convert(many)
    optimizers = [OPTIMIZERS[optimizer](net.parameters()) for net in (one, many)]
    before = [id(p) for p in many.parameters()]
    losses, gradients = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(EXAMPLES * count, 1, 8, 8, generator=generator)
        y = torch.randint(0, 3, (len(x),), generator=generator)
        whole, part = stepped(one, optimizers[0], x, y), stepped(many, optimizers[1], x[rank::count], y[rank::count])
        dist.all_reduce(part)
        losses.append([whole.item(), part.item() / count])
        if step in REMOVALS:
            gradients.append(removed(one, many, optimizers, step))
    state = [
        [{name: list(value.shape) for name, value in own.state[p].items()} for p in own.param_groups[0]["params"]]
        for own in optimizers
    ]
    return {
        "losses": losses,
        "gradients": gradients,
        "widths": [[list(p.shape) for p in net.parameters()] for net in (one, many)],
        "sizes": [many[0].out_channels, many[2].in_channels, many[5].in_features],
        "state": state,
        "weights": [largest(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True)],
        "same objects": before == [id(p) for p in many.parameters()],
    }


def run(folder, count):
    """What each of some processes ended with, as a list by rank."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(count), str(folder)] for rank in range(count)]
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(said)[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def main(rank, count, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    result = {name: train(mesh, name) for name in OPTIMIZERS}
    result |= {"unreduced": unreduced(mesh), "sharded elsewhere": sharded_elsewhere(mesh)}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # all have written what they end with
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is shutting down


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
