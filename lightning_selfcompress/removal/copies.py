"""Copies of a network beside it: moving averages, target networks, shadows in lists.

Code outside the watched steps updates such copies position by position. So a channel leaves a network and its copy
together, or it stays in both. A copy is found before anything is removed, by what is known of it:

- A part that no step trains has the names and shapes of a part that is trained, and something writes to it. Its
  channels are tied to those of the original, and its bit depths and exponents follow, if nobody else moves them:
  code that averages ``parameters()`` does not see them.
- Such a part had the values of the original at the start, and nothing has written to it yet. The channels of the
  original wait, since the first update may come in any epoch.
- A tensor of a weight's shape is in a list, a dictionary or an object that a module or a callback holds, and another
  one than before is found in its place; or it is a buffer whose entries do not live and die with those of the weight.
  The channels of the weight are pinned.

A frozen network of the same kind with values of its own that nothing writes to (a teacher) is no copy.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_selfcompress.channels.channels import Channels
from lightning_selfcompress.quantize.parameters import QuantizedParameter, attributes_of, quantized_parameters
from lightning_selfcompress.tensors import name_of, stored_tensors

Fingerprint = tuple[float, ...]


class Copies:
    """Finds the copies that a module holds of parts of itself.

    Args:
        module: A converted module, before its first training step.

    Attributes:
        told: One sentence for each copy that was found.
        followers: The paths of copies whose bit depths follow, and of their originals.
    """

    def __init__(self, module: nn.Module) -> None:
        self.told: list[str] = []
        self.followers: dict[str, str] = {}
        self._written: set[str] = set()
        self._places: dict[str, Fingerprint] = {}  # of tensors outside, when they were seen first
        self._updated: dict[str, str] = {}  # weight -> the place of a tensor of its shape that is updated
        self._equal: dict[str, str] = {}  # weight -> the place of a tensor with the values it had at the start
        self._start = {name: _fingerprint(p) for name, p in module.named_parameters()}
        self._depths = {p.name: _learned(p) for p in quantized_parameters(module)}

    def note(
        self,
        module: nn.Module,
        channels: Channels,
        others: Iterable[tuple[str, Any]] = (),
        averages: Iterable[nn.Module] = (),
    ) -> Channels:
        """Returns the channels with those of copies tied to those of their originals, or pinned.

        Args:
            module: The module, with the parameters that it had at the start and perhaps more.
            channels: Its channels.
            others: Objects outside the module that may hold copies, such as callbacks, each with its name.
            averages: Copies outside that are known to lose channels along.
        """
        for name, p in module.named_parameters():
            self._start.setdefault(name, _fingerprint(p))  # of a module that was added since
        for copied, original in _lookalikes(module, set(channels.passive)):
            if self._is_written(module, copied):
                channels = self._tie(module, channels, copied, original)
        for name, where in self._shadows(module, channels, others, averages).items():
            numbers = channels.of_tensors({name})
            channels = channels.pin(numbers, f"{where!r} holds a tensor of its shape")
        return channels

    def _shadows(
        self,
        module: nn.Module,
        channels: Channels,
        others: Iterable[tuple[str, Any]],
        averages: Iterable[nn.Module],
    ) -> dict[str, str]:
        """Returns the weights of whose shape somebody updates another tensor, each with where that is."""
        weights: dict[tuple[int, ...], list[str]] = {}
        for p in quantized_parameters(module):
            if p.latent.requires_grad and p.latent.dim() > 1:
                weights.setdefault(tuple(p.latent.shape), []).append(p.name)
        own = {id(m) for net in (module, *averages) for m in net.modules()}
        own |= {id(t) for t in stored_tensors(module).values()}
        found: dict[str, str] = {}
        for where, buffer in ((n, b) for n, b in module.named_buffers() if tuple(b.shape) in weights):
            for weight in weights[tuple(buffer.shape)]:
                if not all(_same(channels, weight, where, dim) for dim in range(2)):  # as it is for a mask
                    found[weight] = where
        held = [(name_of(path, name), value) for path, m in module.named_modules() for name, value in attributes_of(m)]
        for place, tensor, is_own in (
            *((place, tensor, True) for place, tensor in _held(held, own)),
            *((place, tensor, False) for place, tensor in _held(others, own)),
        ):
            for weight in weights.get(tuple(tensor.shape), ()):
                now = _fingerprint(tensor)
                if self._places.setdefault(place, now) != now:
                    self._updated[weight] = place
                elif is_own and now == self._start[weight]:  # what callbacks keep of the start are records
                    self._equal[weight] = place
        return found | self._updated

    def waiting(self, module: nn.Module, channels: Channels) -> dict[int, str]:
        """Returns the channels that may still be copied into an equal part, each with the path of that part."""
        found: dict[int, str] = {}
        for copied, original in _lookalikes(module, set(channels.passive)):
            names = [name for name, _ in module.get_submodule(copied).named_parameters()]
            pairs = [(name_of(copied, name), name_of(original, name)) for name in names]
            if not self._is_written(module, copied) and all(self._start[a] == self._start[b] for a, b in pairs):
                found |= dict.fromkeys(channels.of_tensors({name for pair in pairs for name in pair}), copied)
        for weight, place in self._equal.items():
            found |= dict.fromkeys(channels.of_tensors({weight}), place)
        return found

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Gives copies the bit depths and exponents that their originals have now.

        A copy follows no longer once it, or its original, is gone or has other shapes.
        """
        if not self.followers:
            return
        parts = dict(module.named_modules())
        for copied, original in list(self.followers.items()):
            one, other = (list(quantized_parameters(parts[p])) if p in parts else [] for p in (copied, original))
            tensors = [[t for p in weights for t in p.learned] for weights in (one, other)]
            if [t.shape for t in tensors[0]] != [t.shape for t in tensors[1]]:
                del self.followers[copied]
                continue
            for own, theirs in zip(*tensors, strict=True):
                own.copy_(theirs)

    def renew(self, module: nn.Module, names: Iterable[str]) -> None:
        """Goes on after a removal, which is no write.

        Args:
            module: The module after the removal.
            names: The parameters that have become smaller.
        """
        parameters = dict(module.named_parameters())
        for name in parameters.keys() & set(names):
            self._start[name] = _fingerprint(parameters[name])

    def _is_written(self, module: nn.Module, path: str) -> bool:
        """Returns whether any parameter of a part has been written to since the start."""
        for name, p in module.get_submodule(path).named_parameters():
            if p.dim() > 1 and _fingerprint(p) != self._start[name_of(path, name)]:  # biases fade
                self._written.add(path)
        return path in self._written

    def _tie(self, module: nn.Module, channels: Channels, copied: str, original: str) -> Channels:
        own, other = ({p.name for p in quantized_parameters(module.get_submodule(m))} for m in (copied, original))
        stored = stored_tensors(module.get_submodule(copied))
        pairs = [(name_of(copied, name), name_of(original, name)) for name, t in stored.items() if t.dim()]
        known = {slot.name for slot in channels.slots}
        if own != other or not known.issuperset(name for pair in pairs for name in pair):
            self._say(f"{copied!r} is a copy of {original!r} in float, so the channels of {original!r} stay.")
            return channels.pin(channels.of_tensors({b for _, b in pairs}), f"{copied!r} is a copy of it in float")
        self._say(f"{copied!r} is a copy of {original!r}: channels stay in both until they are dead in both.")
        names = {a for a, _ in pairs}  # what is known of the original holds for its copy as well
        channels = replace(
            channels,
            unseen=tuple(n for n in channels.unseen if n not in names),
            untouched=tuple(n for n in channels.untouched if n not in names),
        )
        depths = [replace(p, name=name_of(copied, p.name)) for p in quantized_parameters(module.get_submodule(copied))]
        if all(self._depths.get(p.name) == _learned(p) for p in depths):
            self.followers[copied] = original
        return channels.tie(pairs, f"{copied!r} is a copy of it")

    def _say(self, sentence: str) -> None:
        if sentence not in self.told:
            self.told.append(sentence)


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> Fingerprint:
    """Returns numbers that are equal for equal tensors, and that a write to a tensor changes."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.numel() == 0:
        return ()
    flat = tensor.detach().flatten()[:: max(1, tensor.numel() >> 20)]  # of large tensors a million entries
    flat = flat.to(torch.float64 if flat.device.type == "cpu" else torch.float32)
    weights = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
    return tuple(torch.stack([flat.sum(), (flat * weights).sum(), flat.abs().amax()]).tolist())


def _learned(parameter: QuantizedParameter) -> tuple[Fingerprint, ...]:
    return tuple(_fingerprint(t) for t in parameter.learned)


def _lookalikes(module: nn.Module, passive: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the paths of a part that no step trains and of a part of the same names and shapes that is trained."""
    parts = {path: m for path, m in module.named_modules() if path}
    signatures = {path: _signature(m) for path, m in parts.items()}
    by_signature: dict[Any, list[str]] = {}
    for path, signature in signatures.items():
        if any(len(shape) > 1 for _, shape in signature):
            by_signature.setdefault(signature, []).append(path)
    done: list[str] = []
    for path, signature in signatures.items():
        if any(path.startswith(f"{outer}.") for outer in done):
            continue
        names = [name_of(path, name) for name, _ in signature]
        if not names or not passive.issuperset(names):
            continue
        for other in by_signature.get(signature, ()):
            inside = other.startswith(f"{path}.") or path.startswith(f"{other}.")
            if other != path and not inside and not passive.issuperset(name_of(other, n) for n, _ in signature):
                done.append(path)
                yield path, other


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((n, tuple(p.shape)) for n, p in module.named_parameters() if not nn.parameter.is_lazy(p))


def _same(channels: Channels, one: str, other: str, dim: int) -> bool:
    """Returns whether two tensors have the same channels along a dimension."""
    return bool((channels.of(one, dim) == channels.of(other, dim)).all())


_LONG = 10_000  # items: a container of more holds data


def _held(values: Iterable[tuple[str, Any]], own: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that are not a module's own in values, their items and their attributes, by their places."""
    entered: set[int] = set()
    stack = list(values)
    while stack:
        place, value = stack.pop()
        if id(value) in entered or id(value) in own:
            continue
        entered.add(id(value))
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, Mapping) and len(value) < _LONG:
            stack += [(f"{place}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple | deque) and len(value) < _LONG:
            stack += [(f"{place}[{i}]", item) for i, item in enumerate(value)]
        elif not isinstance(value, _NOT_ENTERED) and not type(value).__module__.startswith(_LIBRARIES):
            stack += [(f"{place}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


_LIBRARIES = ("lightning.", "pytorch_lightning.", "torch.utils.data")
_NOT_ENTERED = (type, Optimizer, type(torch), type(lambda: None))
