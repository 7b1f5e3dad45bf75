"""What is measured of one fit: which weights are quantized, which killed channels leave, and what outputs change."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.parameters import learned_names, quantized_parameters
from lightning_selfcompress.tensors import name_of, tensors_in

_HIDDEN = re.compile(  # the first layers of feed-forward blocks, as their packages name them
    r"(fc1|c_fc|wi(_\d)?|intermediate\.dense|intermediate_dense|up_proj|gate_proj|gate_up_proj|lin1|linear1|dense1)"
    r"(\.weight)?$|(ff\.net\.0\.proj|pwconv1|pwff_layer\.0|ffn\.0|mlp\.(0|dense1))\.weight$"
)


EVERY = 4  # of the channels of each layer one in so many is killed: widths are multiples of it


@torch.no_grad()
def outputs(module: Any, batch: Any) -> list[Tensor]:
    """The outputs of a network in evaluation mode, for the same random numbers each time."""
    was_training = {m: m.training for m in module.modules()}
    module.eval()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(next(p.dtype for p in module.parameters()))  # as the Trainer does: losses make tensors
    try:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found = [t.detach().clone() for t in tensors_in(module.loss_of(module.net, batch))]
    finally:
        torch.set_default_dtype(dtype)
    for m, training in was_training.items():
        m.training = training
    return found


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference between two lists of outputs, relative to the largest output."""
    assert len(some) == len(others)
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        assert one.shape == other.shape, f"outputs of shape {tuple(one.shape)} became {tuple(other.shape)}"
        if one.numel() and not torch.equal(one, other):
            one, other = one.double(), other.double()
            scale = one.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-300)
            same = (one == other) | (one.isnan() & other.isnan())
            worst = max(worst, ((one - other).abs()[~same].max() / scale).nan_to_num(float("inf")).item())
    return worst


def share_quantized(module: nn.Module) -> float:
    """The share of the entries of parameters of several dimensions that belong to quantized weights."""
    sizes = {id(p): p.numel() for p in module.parameters() if p.dim() > 1}
    quantized = sum(sizes.get(id(p.latent), 0) for p in quantized_parameters(module))
    return quantized / max(sum(sizes.values()), 1)


def float_reasons(module: nn.Module, said: dict[str, str]) -> dict[str, int]:
    """Why parameters of several dimensions are not quantized: the reason, and their entries."""
    quantized = {id(p.latent) for p in quantized_parameters(module)}
    found: Counter[str] = Counter()
    seen = set(quantized)
    for path, owner in module.named_modules():
        for name, p in owner._parameters.items():
            if p is not None and p.dim() > 1 and id(p) not in seen:
                seen.add(id(p))
                why = said.get(name_of(path, name)) or said.get(path) or "not known as a weight"
                found[f"{type(owner).__name__}.{name}: {why}"] += p.numel()
    return dict(found.most_common())


def of_last_head(channels: Channels, depth_name: str) -> list[int]:
    """The positions of the channels in the last head of a layer; none if it has no heads, or one."""
    head = {channel: number for channel, number, *_ in channels.cells.tolist()}
    heads = [head.get(channel) for channel in channels.of(depth_name, 0).tolist()]
    known = [number for number in heads if number is not None]
    if len(set(known)) < 2:
        return []
    return [position for position, number in enumerate(heads) if number == known[-1]]


def whole(channels: Channels, depth_name: str, dying: list[int]) -> list[int]:
    """The last quarter of what is tied in a layer, as by group normalization, if the given positions cut through it."""
    numbers = channels.of(depth_name, 0)
    tied = list(dict.fromkeys(numbers.tolist()))
    cut = set(numbers[dying].tolist()) & set(np.delete(numbers, dying).tolist())
    if not cut or len(tied) < 2:
        return dying
    return np.flatnonzero(np.isin(numbers, tied[-max(1, len(tied) // EVERY) :])).tolist()


class Probe(pl.Callback):
    """Kills channels after the first step, and measures around every removal. It stands before SelfCompression.

    Args:
        compression: The callback that is tried.
        batch: What the outputs are measured on.
    """

    def __init__(self, compression: SelfCompression, batch: Any) -> None:
        self.compression, self.batch = compression, batch
        self.share = self.worst = 0.0
        self.widths: dict[str, int] = {}
        self.killed: dict[str, int] = {}
        self.heads: set[str] = set()  # weights of which a whole head was killed
        self.refused: Counter[str] = Counter()
        self.said: dict[str, str] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps what the plan of the conversion says of layers that stay in float."""
        setup = self.compression._module_setup
        assert setup is not None
        convert = setup.convert

        def noting(module: nn.Module, *, complete: bool = False, axes: Any = None) -> Any:
            plan = convert(module, complete=complete, axes=axes)
            self.said |= {layer.name: layer.reason for layer in plan.left_alone}
            self.said |= {name: why for name, why in (axes or {}).items() if isinstance(why, str)}
            return plan

        setup.convert = noting  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Kills one in four channels of every layer, those of the same numbers everywhere, or a head, or a group."""
        if self.widths:
            return
        self.share = share_quantized(pl_module)
        assert self.compression._removal is not None
        channels = self.compression._removal.channels
        for p in quantized_parameters(pl_module):
            self.widths[p.name] = p.channels
            if p.channels >= EVERY:
                depths = p.raw_depth.data.view(p.spec.axis.groups, -1)
                dying = list(range(1, depths.shape[1], EVERY))
                if p.spec.axis.dim == 1 and p.latent.shape[0] == 1:
                    continue  # vectors of attention, one for each head: without one, a head still returns values
                if channels is not None and len(depths) == 1:
                    depth_name = learned_names(p.name)[0]
                    head = of_last_head(channels, depth_name)
                    self.heads |= {p.name} if head else set()
                    dying = head or whole(channels, depth_name, dying)
                depths[:, dying] = -1.0
                self.killed[p.name] = len(depths) * len(dying)
            p.layer.forget_quantized()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Has the removal that is about to come measured."""
        removal = self.compression._removal
        assert removal is not None
        if "carry_out" in vars(removal):
            return
        carry_out, plan = removal.carry_out, removal._plan

        def measured(trainer: Any, module: Any) -> Any:
            before = outputs(module, self.batch)
            result = carry_out(trainer, module)
            self.worst = max(self.worst, difference(before, outputs(module, self.batch)))
            return result

        def noting(trainer: Any, module: Any) -> Any:
            made = plan(trainer, module)
            self.refused = Counter({f"{name}: {why}": n for (name, why), n in made.refused.items()})
            return made

        removal.carry_out, removal._plan = measured, noting  # type: ignore[method-assign]

    def shares(self, module: nn.Module) -> Iterator[tuple[str, int, int]]:
        """The name of each weight, the channels killed, and how many left, of which no more count than were killed."""
        now = {p.name: p.channels for p in quantized_parameters(module)}
        return ((name, n, min(n, self.widths[name] - now[name])) for name, n in self.killed.items() if name in now)

    def parts(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """The channels killed and those that left, of hidden widths of feed-forward blocks and of whole heads."""
        shares = list(self.shares(module))
        kinds = {
            "hidden": [(n, left) for name, n, left in shares if _HIDDEN.search(name)],
            "heads": [(n, left) for name, n, left in shares if name in self.heads],
        }
        return {kind: (sum(n for n, _ in some), sum(n for _, n in some)) for kind, some in kinds.items() if some}
