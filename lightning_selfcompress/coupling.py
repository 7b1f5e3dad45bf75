"""Coupling: a weight counts as far as its inputs are alive, so that a channel pays for what vanishes with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.graph import Channels, stored_tensors
from lightning_selfcompress.layers import QuantizedParameter


def alive_factor(
    b: Tensor,  # (producers,)
    channel: Tensor,  # (producers,) int64
    count: int,
) -> Tensor:
    """How much each channel is alive: ``1 - prod_k (1 - min(b_k, 1))`` over its producers k, differentiable in ``b``.

    A channel with one producer has ``min(b, 1)``; one with several, a residual stream, is alive while any of them is.

    Args:
        b: Bit depths of all producers, in bits.
        channel: The channel that each of them produces, from 0 to ``count``; ``count`` for one that does not matter.
        count: Number of channels.

    Returns:
        ``(count,)``, from 0 to 1.
    """
    dead = b.new_ones(count + 1).scatter_reduce(0, channel, 1 - b.clamp(max=1), "prod")
    return 1 - dead[:count]


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which channels the inputs of every weight come from, so that weights count while their inputs are alive.

    Args:
        produced: The channel of each depth ``(channels of all weights,)``; ``count`` for one that cannot be removed.
        count: Number of channels that can be removed.
        inputs: The channels of the inputs of all weights, one weight after the other; ``count`` for fixed ones.
        factor: For each of ``inputs`` which factor it belongs to: a dimension of a weight.
        sizes: Number of inputs of each factor.
        rounds: For each weight its first factor, its second, ...; the number of factors where it has no more.
        weight: The weight of each depth ``(channels of all weights,)``.
    """

    produced: Tensor
    count: int
    inputs: Tensor
    factor: Tensor
    sizes: Tensor
    rounds: tuple[Tensor, ...]
    weight: Tensor

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[QuantizedParameter], channels: Channels) -> "Coupling":
        """The coupling of a model's weights through its channels."""
        names = {id(t): name for name, t in stored_tensors(model).items()}
        numbers = np.cumsum(channels.removable()) - 1
        count = int(channels.removable().sum())
        compact = np.where(channels.removable(), numbers, count)
        produced, inputs = [], []
        owners: list[int] = []  # of each factor, the weight it belongs to
        for i, p in enumerate(parameters):
            produced.append(compact[channels.of(names[id(p.raw_depth)], 0)])
            for dim in _input_dims(p):
                along = compact[channels.of(names[id(p.latent)], dim)]
                if (along < count).any():
                    inputs.append(along)
                    owners.append(i)
        rounds = _rounds(owners, len(parameters))
        device = parameters[0].raw_depth.device
        sizes = [len(along) for along in inputs]

        def to(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values, np.int64), device=device)

        return cls(
            produced=to(np.concatenate(produced)),
            count=count,
            inputs=to(np.concatenate(inputs) if inputs else []),
            factor=to(np.repeat(np.arange(len(owners)), sizes) if inputs else []),
            sizes=to(sizes),
            rounds=tuple(to(r) for r in rounds),
            weight=to(np.repeat(np.arange(len(parameters)), [p.channels for p in parameters])),
        )

    def live_share(self, b: Tensor) -> Tensor:
        """For each depth the share of its weights that have a live input, ``(channels of all weights,)``."""
        alive = torch.cat([alive_factor(b, self.produced, self.count), b.new_ones(1)])
        sums = b.new_zeros(len(self.sizes)).index_add(0, self.factor, alive[self.inputs])
        factors = torch.cat([sums / self.sizes, b.new_ones(1)])
        share = torch.ones_like(factors[:1])
        for chosen in self.rounds:
            share = share * factors[chosen]
        return share[self.weight] if self.rounds else torch.ones_like(b)


def _input_dims(p: QuantizedParameter) -> list[int]:
    """The dimensions of a weight that count inputs; not those of a depthwise layer, whose inputs go with it."""
    axis = p.spec.axis
    own = {axis.dim} if axis.groups < p.latent.shape[0] or axis.groups == 1 else {0, 1}
    return [d for d in range(p.latent.dim()) if d not in own]


def _rounds(owners: Sequence[int], weights: int) -> list[list[int]]:
    """For each weight its first factor, its second, and so on; ``len(owners)`` where it has none."""
    rounds: list[list[int]] = []
    taken = [0] * weights
    for factor, owner in enumerate(owners):
        if taken[owner] == len(rounds):
            rounds.append([len(owners)] * weights)
        rounds[taken[owner]][owner] = factor
        taken[owner] += 1
    return rounds
