"""What peers.py asks of Torch-Pruning: its groups of one channel, their channels made dead, and their removal.

It is asked as its README does: `DependencyGraph.build_dependency` and `get_pruning_group`. Its own `BasePruner` says
which groups it declines, and which channels of grouped convolutions, group norms and attention heads go together; the
layers of the outputs are in `ignored_layers`, the heads in `num_heads`. Bare parameters are left to its default, their
last dimension, which is the right one for those of the zoo. It gets no other hints, and no network is edited for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)  # BasePruner's default
ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)  # compute across channels: each one's removal shows
BY_DESIGN = {  # what its README, examples, assertions or way of tracing exclude or leave to the user
    "resnet_pad": "`F.pad` by a number that the block keeps, to be edited by hand",
    "shufflenet": "channel shuffling, a failure its examples list",
    "shufflenet_v2": "channel shuffling, a failure its examples list",
    "ghost": "a slice to a number that the module keeps, to be edited by hand",
    "c2f": "its example for YOLO rewrites this block first",
    "char_transformer": "a view to the width of the input, to be edited by hand",
    "masked_transformer": "a buffer of positions, to be edited by hand",
    "lstm_classifier": "LSTMs of more than one layer, or read at their state",
    "einsum": "weights used outside of their layers",
}
Inputs = tuple[Tensor, ...]
Sample = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Proposal:
    """A group that Torch-Pruning proposes: the layer it starts from, the function that prunes it and its channels."""

    root: str
    prune: Callable[..., Any]
    indices: tuple[int, ...]
    across: bool


def dependency_graph(net: nn.Module, inputs: Inputs) -> tp.DependencyGraph:
    """The dependency graph, of a net in eval mode as in the README."""
    return tp.DependencyGraph().build_dependency(net.eval(), example_inputs=inputs, verbose=False)


def attention_heads(net: nn.Module) -> dict[nn.Module, int]:
    """The argument ``num_heads``: torch's attention, and the joint projections of the zoo's own."""
    modules: list[Any] = list(net.modules())
    torchs = {m: m.num_heads for m in modules if isinstance(m, nn.MultiheadAttention)}
    return torchs | {m.c_attn: m.n_head for m in modules if hasattr(m, "c_attn")}


def pruned_outputs(graph: tp.DependencyGraph, group: Any) -> Iterator[tuple[Any, list[int]]]:
    """The nodes of a group that lose output channels, and which."""
    for dependency, indices in group:
        if graph.is_out_channel_pruning_fn(dependency.handler):
            yield dependency.target, indices


def all_groups(net: nn.Module, inputs: Inputs, ignored: list[nn.Module]) -> list[Any]:
    """The groups of all channels of each layer, as its README scans them."""
    graph = dependency_graph(net, inputs)
    return list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOTS)))


def proposals(net: nn.Module, inputs: Inputs, ignored: list[nn.Module], sample: Sample) -> list[Proposal]:
    """The distinct groups of one channel, for a sample of the channels of each layer."""
    heads = attention_heads(net)
    pruner = tp.pruner.BasePruner(
        net.eval(),
        inputs,
        importance=tp.importance.RandomImportance(),
        ignored_layers=ignored,
        num_heads=heads,
        in_channel_groups={},
        out_channel_groups={},
    )
    graph, names = pruner.DG, {m: path for path, m in net.named_modules()}
    found: dict[Any, Proposal] = {}
    for layer in [m for m in graph.module2node if isinstance(m, ROOTS)]:
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        group = graph.get_pruning_group(layer, prune, list(range(graph.get_out_channels(layer))))
        if any(node.module is output for node, _ in pruned_outputs(graph, group) for output in ignored):
            continue
        if pruner._is_atten_group(group)[0]:
            group = pruner._downstream_node_as_root_if_attention(group)
        if group is None:
            continue
        (root, indices), repeats = group[0], pruner._get_channel_groups(group)
        size = len(indices) // repeats
        for i in sample(range(size)):
            chosen = tuple(range(i, size * repeats, size))
            group = graph.get_pruning_group(root.target.module, root.handler, list(chosen))
            if graph.check_pruning_group(group):
                across = any(isinstance(n.module, ACROSS) or n.module in heads for n, _ in pruned_outputs(graph, group))
                key = frozenset((id(d.target), d.handler.__name__, *sorted(indices)) for d, indices in group)
                found.setdefault(key, Proposal(names[root.target.module], root.handler, chosen, across))
    return list(found.values())


@torch.no_grad()
def zero(node: Any, indices: list[int], count: int) -> None:
    """Sets what computes these of ``count`` output channels to zero, constants included."""
    module = node.module
    if isinstance(module, nn.Parameter):
        module.transpose(0, node.pruning_dim)[indices] = 0
        return
    if isinstance(module, nn.Embedding):
        module.weight[:, indices] = 0
        return
    for name, p in module.named_parameters():
        if name == "weight" and getattr(module, "transposed", False):
            for i in indices:  # (groups, in / groups, out / groups, *kernel)
                p.unflatten(0, (module.groups, -1))[i // p.shape[1], :, i % p.shape[1]] = 0
        else:  # an LSTM's gates, and queries, keys and values, lie one after the other
            p.unflatten(0, (-1, count))[:, indices] = 0
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine and module.running_mean is not None:
        module.running_mean[indices] = 0


def dead(proposal: Proposal, net: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """Makes the channels of a group dead in the network; returns what removes them."""
    graph = dependency_graph(net, inputs)
    group = graph.get_pruning_group(net.get_submodule(proposal.root), proposal.prune, list(proposal.indices))
    for node, indices in pruned_outputs(graph, group):
        count = graph.get_out_channels(node)
        if count is not None:
            zero(node, [i for i in indices if 0 <= i < count], count)
    remove: Callable[[], None] = group.prune
    return remove


def unsupported(name: str, net: nn.Module) -> str:
    """What of a network of the zoo it cannot do by its design; layers of torch that it has no pruner for."""
    kinds = {
        type(m).__name__
        for m in net.modules()
        if type(m).__module__.startswith("torch.nn") and m._parameters
        if tp.ops.module2type(m) == tp.ops.OPTYPE.ELEMENTWISE
    }
    return f"no pruner for {', '.join(sorted(kinds))}" if kinds else BY_DESIGN.get(name, "")
