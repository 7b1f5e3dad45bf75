"""Coupling: a weight counts as far as its inputs are alive, so a channel pays for all weights removed with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.layers import COUPLING, Quantized
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters
from lightning_selfcompress.tensors import stored_tensors


def alive_factor(
    b: Tensor,  # (producers,)
    channel: Tensor,  # (producers,) int64
    count: int,
) -> Tensor:
    """Returns how far each channel is alive, ``1 - prod_k (1 - min(b_k, 1))`` over its producers k.

    The factor is differentiable in ``b``. A channel with one producer has the factor ``min(b, 1)``. A channel with
    several producers, as in a residual stream, is alive while any of these is alive.

    Args:
        b: Bit depths of all producers, in bits.
        channel: The channel of each producer, below ``count``; ``count`` stands for any channel to be ignored.
        count: Number of channels.

    Returns:
        The factors, ``(count,)``, from 0 to 1.
    """
    return 1 - dead_factor(1 - b.clamp(max=1), channel, count)[:count]


def dead_factor(missing: Tensor, channel: Tensor, count: int) -> Tensor:
    """Returns ``prod_k (1 - min(b_k, 1))`` for each channel, ``(count + 1,)``; ``missing`` is ``1 - min(b, 1)``."""
    return missing.new_ones(count + 1).scatter_reduce(0, channel, missing, "prod")


@dataclass(frozen=True, eq=False)
class CoupledWeight:
    """The channels that a weight produces and reads, as :func:`couple` notes them on the weight's layer.

    Args:
        produced: The number of the channel that each bit depth produces, ``(channels,)``, int64; -1 for a channel that
            is never removed.
        inputs: The number of the channel at each position, for each dimension of the weight other than those of its
            output channels; -1 for a position that is never removed.
        floats: How many values left in float (biases, normalization) go with the channel that each bit depth produces,
            ``(channels,)``; 0 for a channel that is never removed.
    """

    produced: NDArray[np.int64]
    inputs: Mapping[int, NDArray[np.int64]]
    floats: NDArray[np.float64]

    def fits(self, parameter: QuantizedParameter) -> bool:
        """Returns whether these notes fit the shape of a weight."""
        shape = parameter.latent.shape
        along = all(len(numbers) == shape[dim] for dim, numbers in self.inputs.items())
        return along and len(self.produced) == parameter.channels


def couple(model: nn.Module, channels: Channels) -> None:
    """Notes on every quantized layer the channels that its weights produce and read.

    The notes are copied and pickled with the layer, and are deleted when the layer's shape changes.

    Args:
        model: A converted module.
        channels: The channels of the module.
    """
    names = {id(t): name for name, t in stored_tensors(model).items()}
    removable = channels.removable()
    number = np.where(removable, np.cumsum(removable) - 1, -1)
    slots = {(slot.name, slot.dim): number[channels.group[slot.atoms]] for slot in channels.slots}
    floats = np.where(removable, _floats(model, channels), 0.0)
    along = {slot.name: floats[channels.group[slot.atoms]] for slot in channels.slots if slot.produces}
    for layer in model.modules():
        if isinstance(layer, Quantized):
            notes = {}
            for name in layer._quantized:
                p = QuantizedParameter(name, layer, name)
                latent, depth = names[id(p.latent)], names[id(p.raw_depth)]
                if (depth, 0) in slots:  # else the layer was added after the channels were found
                    inputs = {dim: slots[latent, dim] for dim in _input_dims(p)}
                    notes[name] = CoupledWeight(slots[depth, 0], inputs, along[depth])
            layer.__dict__[COUPLING] = notes


def _floats(model: nn.Module, channels: Channels) -> NDArray[np.float64]:
    """Returns how many values of tensors that are not quantized each channel has, ``(channels.count,)``."""
    tensors = stored_tensors(model, transient=False)
    quantized = {id(t) for p in quantized_parameters(model) for t in (p.latent, *p.learned)}
    counts = np.zeros(channels.count)
    for slot in channels.slots:
        tensor = tensors.get(slot.name)
        if tensor is not None and not slot.attribute and id(tensor) not in quantized:
            np.add.at(counts, channels.group[slot.atoms], tensor.numel() / max(slot.size, 1))
    return counts


def _coupled(parameter: QuantizedParameter) -> CoupledWeight | None:
    """Returns the notes on a weight, or None if there are no notes or they do not fit its shape."""
    found: CoupledWeight | None = parameter.layer.__dict__.get(COUPLING, {}).get(parameter.weight_name)
    return found if found is not None and found.fits(parameter) else None


@dataclass(frozen=True, eq=False)
class Coupling:
    """The channels that the inputs of every weight come from, so that weights count while their inputs are alive.

    A factor is the live share of the inputs along one dimension of a weight: the mean over the inputs of how far each
    is alive. An entry is one channel among the inputs of one factor.

    Args:
        produced: The channel of each bit depth, ``(channels of all weights,)``; ``count`` if it cannot be removed.
        count: Number of channels that can be removed.
        weight: The weight of each bit depth, ``(channels of all weights,)``.
        weights: Number of weights.
        channel: The channel of each entry.
        factor: The factor of each entry.
        times: Number of inputs of the entry's factor that are the entry's channel.
        fixed: Number of inputs of each factor that cannot be removed. The last factor is a placeholder, always 1.
        sizes: Number of inputs of each factor.
        rounds: One tensor ``(weights,)`` with the first factor of every weight, one with the second factor, and so on;
            the placeholder stands for a missing factor.
        slot: The index of each entry's factor in the concatenation of ``rounds``.
        floats: How many values left in float go with each bit depth's channel, ``(channels of all weights,)``.
        positions: For each weight, the channel at each position of the dimensions that have factors, by dimension.
    """

    produced: Tensor
    count: int
    weight: Tensor
    weights: int
    channel: Tensor
    factor: Tensor
    times: Tensor
    fixed: Tensor
    sizes: Tensor
    rounds: tuple[Tensor, ...]
    slot: Tensor
    floats: Tensor
    positions: tuple[Mapping[int, Tensor], ...]

    @classmethod
    def of(cls, parameters: Sequence[QuantizedParameter]) -> "Coupling":
        """Makes the coupling of quantized weights from the notes of :func:`couple` on their layers.

        Args:
            parameters: Quantized weights. An input that no given weight produces counts as alive, and so do all inputs
                of a weight without notes.
        """
        notes = [_coupled(p) for p in parameters]
        pairs = zip(parameters, notes, strict=True)
        made = [np.full(p.channels, -1) if note is None else note.produced for p, note in pairs]
        floats = [np.zeros(p.channels) if n is None else n.floats for p, n in zip(parameters, notes, strict=True)]
        known = np.unique(np.concatenate(made))
        known = known[known >= 0]
        count = len(known)

        def compact(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            places = np.searchsorted(known, numbers)
            found = np.append(known, -2)[places] == numbers
            return np.where(found, places, count)

        produced: list[NDArray[np.int64]] = [compact(numbers) for numbers in made]
        along = [_along(note, compact, count) for note in notes]
        inputs = [numbers for found in along for numbers in found.values()]
        owners = [i for i, found in enumerate(along) for _ in found]  # the weight of each factor
        rounds = _rounds(owners, len(parameters))
        entries = [np.unique(numbers[numbers < count], return_counts=True) for numbers in inputs]
        factor = np.repeat(np.arange(len(owners)), [len(found) for found, _ in entries])
        slots = np.argsort(np.concatenate([*rounds, []]), kind="stable")[: len(owners)]  # the placeholder sorts last
        like = parameters[0].raw_depth.detach()

        def to(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values, np.int64), device=like.device)

        return cls(
            produced=to(np.concatenate(produced)),
            count=count,
            weight=to(np.repeat(np.arange(len(parameters)), [p.channels for p in parameters])),
            weights=len(parameters),
            channel=to(np.concatenate([[], *(found for found, _ in entries)])),
            factor=to(factor),
            times=to(np.concatenate([[], *(times for _, times in entries)])).to(like),
            fixed=to([*((numbers == count).sum() for numbers in inputs), 1]).to(like),
            sizes=to([*map(len, inputs), 1]).to(like),
            rounds=tuple(to(r) for r in rounds),
            slot=to(slots[factor]),
            floats=torch.from_numpy(np.concatenate(floats)).to(like),
            positions=tuple({dim: to(numbers) for dim, numbers in found.items()} for found in along),
        )

    def live_share(self, b: Tensor) -> Tensor:
        """Returns the share, for each bit depth, of its weights with live inputs, ``(channels of all weights,)``."""
        factors = self._factors(alive_factor(b, self.produced, self.count))
        return math.prod(factors, start=b.new_ones(self.weights))[self.weight]

    def size_gradient(
        self,
        b: Tensor,  # (channels of all weights,)
        n: Tensor,  # (channels of all weights,)
    ) -> Tensor:
        """Returns ``d size_bits(b, n * live_share(b)) / db`` in closed form, ``(channels of all weights,)``.

        A weight l has z_l = sum_i n_(l,i) b_(l,i) and factors f_(l,r). Factor r has M_(l,r) inputs, of which m_(l,r,c)
        are channel c, and d_c = prod_k (1 - min(b_k, 1)) over the producers k of c::

            dQ/db_(l,i) = n_(l,i) prod_r f_(l,r) + [b_(l,i) <= 1] d_c / (1 - b_(l,i)) * pull_c, c produced by (l,i)
            pull_c = sum_(l,r) z_l prod_(s != r) f_(l,s) m_(l,r,c) / M_(l,r)

        Args:
            b: Bit depths, in bits.
            n: Number of weights of each channel, with all inputs counted.
        """
        if not self.rounds or (b.device.type == "cpu" and bool((b > 1).all())):
            return n  # all inputs stay alive; on other devices this check would wait for the device
        missing = (1 - b).clamp_(min=1e-30)  # above 0: d / missing is the product over the other producers
        dead = dead_factor(missing, self.produced, self.count)
        factors = self._factors(1 - dead)
        z = b.new_zeros(self.weights).index_add_(0, self.weight, b * n)
        sizes = self.sizes.to(b)
        by_factor = [
            math.prod(factors[:r] + factors[r + 1 :], start=z) / sizes[which] for r, which in enumerate(self.rounds)
        ]
        by_entry = torch.cat(by_factor)[self.slot] * self.times.to(b)
        pull = b.new_zeros(self.count + 1).index_add_(0, self.channel, by_entry)
        own = n * math.prod(factors[1:], start=factors[0])[self.weight]
        return own.addcmul_((pull * dead)[self.produced] / missing, (b <= 1).to(b))

    def alive(self, b: Tensor) -> Tensor:
        """Returns which channels have a producer with a bit depth above 0, ``(count + 1,)``; the last one is true.

        Args:
            b: Bit depths, ``(channels of all weights,)``.
        """
        alive = torch.zeros(self.count + 1, dtype=torch.bool, device=b.device)
        alive[self.produced[b > 0]] = True
        alive[self.count] = True
        return alive

    def shares(self, alive: Tensor) -> list[Tensor]:
        """Returns the shares of living inputs, ``(weights,)``: of all first factors, of all second ones and so on."""
        return self._factors(alive.to(self.times)[: self.count])

    def input_cost(self, z: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Returns what the inputs that are each channel cost their consumers, ``(count + 1,)``.

        Args:
            z: The cost of all living inputs of each weight together, ``(weights,)``, each counted as much as any other.
            shares: The shares of inputs that are alive.
        """
        cost = z.new_zeros(self.count + 1)
        if self.rounds:
            pairs = zip(self.rounds, shares, strict=True)
            by_factor = torch.cat([z / (self.sizes.to(z)[which] * share).clamp(min=1) for which, share in pairs])
            cost.index_add_(0, self.channel, by_factor[self.slot] * self.times.to(z))
        return cost

    def _factors(self, alive: Tensor) -> list[Tensor]:
        """Returns the first factors of all weights, the second factors, and so on, ``(weights,)`` each."""
        live = self.fixed.to(alive).index_add(0, self.factor, alive[self.channel] * self.times.to(alive))
        shares = live / self.sizes.to(alive)
        return [shares[which] for which in self.rounds]


def _along(
    note: CoupledWeight | None, compact: Callable[[NDArray[np.int64]], NDArray[np.int64]], count: int
) -> dict[int, NDArray[np.int64]]:
    """Returns the channels along the dimensions of a weight that have any, numbered anew."""
    found = {dim: compact(numbers) for dim, numbers in note.inputs.items()} if note is not None else {}
    return {dim: numbers for dim, numbers in found.items() if (numbers < count).any()}


def _input_dims(p: QuantizedParameter) -> list[int]:
    """Returns the dimensions of a weight that do not belong to its output channels: inputs and kernel positions."""
    axis = p.spec.axis
    own = {axis.dim} if axis.groups < p.latent.shape[0] or axis.groups == 1 else {0, axis.dim}
    return [d for d in range(p.latent.dim()) if d not in own]


def _rounds(owners: Sequence[int], weights: int) -> list[list[int]]:
    """Returns the first factor of every weight, the second factor, and so on; ``len(owners)`` for a missing one."""
    rounds: list[list[int]] = []
    taken = [0] * weights
    for factor, owner in enumerate(owners):
        if taken[owner] == len(rounds):
            rounds.append([len(owners)] * weights)
        rounds[taken[owner]][owner] = factor
        taken[owner] += 1
    return rounds
