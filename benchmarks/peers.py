"""Which groups of channels Torch-Pruning and this package propose to remove, and which of them are right, over the zoo.

    python benchmarks/peers.py                         # all networks of tests/zoo.py
    python benchmarks/peers.py --only densenet --samples 4

A group is right if its removal changes nothing once its channels are dead: their weights, biases, scales and shifts are
set to zero, the outputs in eval and in train mode (without dropout) are kept, the group is removed, and the outputs are
compared, in float64 to 1e-8 of the largest. Both tools start from the same weights; Torch-Pruning gets the network in
float, this package the converted one.

"Across" are groups of Torch-Pruning that change values, not shapes, and have a LayerNorm, a GroupNorm or attention
among their members: statistics or a scale are taken over the channels there, so that every removal shows, however
right the group is. This package pins such channels. torch_pruning_groups.py says how Torch-Pruning is asked.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import logging
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.channels.watch import Watcher
from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.removal.plan import plan_removal
from lightning_selfcompress.removal.surgery import remove
from lightning_selfcompress.tensors import stored_tensors

if importlib.util.find_spec("torch_pruning") is None:
    sys.exit("Expected Torch-Pruning, the peer to compare with. Install it: pip install torch-pruning==1.6.1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import torch_pruning_groups as peer
from zoo import ZOO

VERDICTS = ("right", "across", "wrong", "failing")
Inputs = tuple[Tensor, ...]


@dataclass
class Score:
    """What became of the groups that a tool proposed for a network.

    Args:
        verdicts: How many groups came out how.
        milliseconds: To find all groups, the median of three.
        removable: Channels that may be removed, and channels of all layers but those of the outputs.
        error: Why there are no groups at all.
        examples: The first group of each verdict.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    milliseconds: float = 0.0
    removable: tuple[int, int] = (0, 0)
    error: str = ""
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, verdict: str, example: str) -> None:
        """Counts one group."""
        self.verdicts[verdict] += 1
        self.examples.setdefault(verdict, example)


def network(name: str, seed: int) -> tuple[nn.Module, Inputs]:
    """A network of the zoo in float64, without dropout, no vector of it at its initial 0 or 1; and its inputs."""
    torch.manual_seed(seed)
    net = ZOO[name].make().double()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
        for b in net.buffers():
            if b.is_floating_point() and b.dim() == 1:
                b.uniform_(0.5, 1.5)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    return net, tuple(x.double() if x.is_floating_point() else x for x in ZOO[name].inputs())


def output_layers(name: str, net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose channels are the network's outputs: the last one, and the images that a GAN makes."""
    layers = [path for path, module in net.named_modules() if isinstance(module, peer.ROOTS)]
    return {path: net.get_submodule(path) for path in layers[-1:] + ["generator.6"] * (name == "gan")}


def outputs(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the network returns in eval mode and in train mode; it stays as it was."""
    found: list[Tensor] = []
    for mode in (False, True):
        with torch.no_grad():
            out = copy.deepcopy(net).train(mode)(*inputs)
        found += [out] if isinstance(out, Tensor) else list(out)
    return found


def compare(net: nn.Module, inputs: Inputs, prune: Callable[[], Any], across: bool = False) -> str:
    """Verdict on a group whose channels are dead already, given what removes it and what other values are called."""
    before = outputs(net, inputs)
    prune()
    after = outputs(net, inputs)
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return "wrong"
        if not bool((old - new).abs().max() <= 1e-8 * old.abs().max()):  # NaN is wrong as well
            return "across" if across else "wrong"
    return "right"


def median_ms(find: Callable[[], Any]) -> float:
    """Milliseconds of a call, the median of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        find()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def sample(items: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """At most ``--samples`` of the items, in order."""
    chosen = random.Random(options.seed).sample(range(len(items)), min(options.samples, len(items)))
    return [items[i] for i in sorted(chosen)]


def score_peer(name: str, options: argparse.Namespace) -> Score:
    """Torch-Pruning on one network."""
    net, inputs = network(name, options.seed)
    ignored = list(output_layers(name, net).values())
    score = Score()
    try:
        score.milliseconds = median_ms(lambda: peer.all_groups(net, inputs, ignored))
        proposals = peer.proposals(net, inputs, ignored, lambda items: sample(items, options))
    except Exception as error:
        score.error = message(error)
        return score
    for proposal in proposals:
        example = f"{proposal.root}, channels {', '.join(map(str, proposal.indices))}"
        smaller = copy.deepcopy(net)
        try:
            prune = peer.dead(proposal, smaller, inputs)
            score.add(compare(smaller, inputs, prune, proposal.across), example)
        except Exception as error:
            score.add("failing", f"{example}: {message(error)}")
    return score


def proposed(channels: Channels) -> np.ndarray:
    """Whether each channel may be removed, on its own: it is not pinned, and no layer is all of it."""
    flags = channels.removable()
    for slot in channels.slots:
        numbers = np.unique(channels.group[slot.atoms])
        if len(numbers) == 1:
            flags[numbers] = False
    return flags


def verdict_of_channel(number: int, channels: Channels, net: nn.Module, inputs: Inputs) -> str:
    """Whether a channel is right, on a copy of the network: depth 0 for its producers, no constants, removed."""
    net = copy.deepcopy(net)
    tensors = stored_tensors(net)
    with torch.no_grad():
        for slot in channels.slots:
            if slot.produces or (slot.fades and slot.size > 1):
                tensors[slot.name].view(-1)[torch.from_numpy(channels.group[slot.atoms] == number)] = 0
    plan = plan_removal(net, channels)
    if plan.channels != (number,):
        raise ValueError(f"Expected the plan to remove channel {number}, got: {plan}")
    return compare(net, inputs, lambda: remove(net, plan.edits))


def score_ours(name: str, options: argparse.Namespace) -> Score:
    """This package on one network."""
    net, inputs = network(name, options.seed)
    ignored = output_layers(name, net)
    convert(net)
    net.train()

    def find() -> Channels:
        watcher = Watcher(net)
        with watcher:
            net(*inputs)
        return watcher.channels()

    score = Score(milliseconds=median_ms(find))
    channels = find()
    flags = proposed(channels)
    layers = [s for s in channels.slots if s.produces and s.name.rpartition(".")[0] not in ignored]
    of_layers = [channels.group[slot.atoms] for slot in layers]
    score.removable = sum(int(flags[g].sum()) for g in of_layers), sum(map(len, of_layers))
    chosen: dict[int, str] = {}
    for slot, group in zip(layers, of_layers, strict=True):
        for number in sample(np.unique(group[flags[group]]).tolist(), options):
            chosen.setdefault(number, f"{slot.name}, channel {np.flatnonzero(group == number)[0]}")
    for number, example in chosen.items():
        try:
            score.add(verdict_of_channel(number, channels, net, inputs), example)
        except Exception as error:
            score.add("failing", f"{example}: {message(error)}")
    return score


def message(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) < 100 else text[:97] + "..."


def row(name: str, theirs: Score, ours: Score, note: str) -> str:
    """One line of the table."""
    counts = [
        " / ".join(str(score.verdicts[v]) for v in verdicts) + f" of {score.verdicts.total()}"
        for score, verdicts in ((theirs, VERDICTS), (ours, ("right", "wrong", "failing")))
    ]
    found = f"failing: {theirs.error}" if theirs.error else counts[0]
    share = ours.removable[0] / ours.removable[1]
    times = f"{theirs.milliseconds:.1f}" if theirs.milliseconds else "", f"{ours.milliseconds:.1f}"
    return f"| {name} | {found} | {times[0]} | {counts[1]} | {share:.0%} | {times[1]} | {note} |"


def total(scores: Sequence[Score]) -> Score:
    """The sum of scores."""
    return Score(
        sum((s.verdicts for s in scores), Counter()),
        sum(s.milliseconds for s in scores),
        (sum(s.removable[0] for s in scores), sum(s.removable[1] for s in scores)),
    )


def main() -> None:
    """Prints the table, the totals and an example of what went wrong in each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", choices=sorted(ZOO), help="one network (default: all)")
    parser.add_argument("--samples", type=int, default=12, help="channels of each layer to try at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    print(
        "| network | Torch-Pruning: right / across / wrong / failing | ms | ours: right / wrong / failing | removable",
        end=" ",
    )
    print("| ms | not supported by Torch-Pruning's design |\n| --- | --- | --- | --- | --- | --- | --- |")
    scores: dict[str, tuple[Score, Score]] = {}
    notes = {name: peer.unsupported(name, ZOO[name].make()) for name in ([options.only] if options.only else ZOO)}
    for name, note in notes.items():
        scores[name] = score_peer(name, options), score_ours(name, options)
        print(row(name, *scores[name], note), flush=True)
    for what, names in (("all", list(notes)), ("all it supports", [name for name in notes if not notes[name]])):
        if names:
            print(row(what, total([scores[n][0] for n in names]), total([scores[n][1] for n in names]), ""))
    print()
    for tool, column in (("Torch-Pruning", 0), ("ours", 1)):
        for name, pair in scores.items():
            for verdict in ("wrong", "failing"):
                if verdict in pair[column].examples:
                    print(f"- {tool}, {name}, {verdict}: {pair[column].examples[verdict]}")
    versions = (f"{package} {importlib.metadata.version(package)}" for package in ("torch", "torch-pruning"))
    print(f"\nMeasured with {' and '.join(versions)}, --samples {options.samples} --seed {options.seed}.")


if __name__ == "__main__":
    main()
