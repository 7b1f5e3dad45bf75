"""Quantized layers: the same object under another class, whose weight attributes return the quantized tensor.

``layer.__class__`` becomes a class made of :class:`Quantized` and the layer's own class. The latent float parameter
stays where it was, ``layer._parameters["weight"]``; what anyone reads as ``layer.weight`` is q(latent, b, e). So the
layer keeps its identity, its ``forward``, its hooks and its state-dict keys, to which the raw bit depths and the
exponents are added. Both are buffers that require gradients: ``parameters()`` lists the same objects before and after,
so that penalties, clamps, norms and moving averages over all parameters see the float network.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_selfcompress.quantize.formula import Range, bit_depth, initial_exponent, q_composite, q_known, quantize


@dataclass(frozen=True)
class ChannelAxis:
    """Where the output channels of a weight lie.

    Args:
        dim: The dimension of the weight that counts output channels.
        groups: Groups along dimension 0 that each have output channels of their own, as in a grouped transposed
            convolution with weights ``(in, out / groups, *kernel)``. 1 for every other layer.
    """

    dim: int = 0
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """Number of output channels of ``weight``."""
        return weight.shape[self.dim] * self.groups

    def split(self, weight: Tensor) -> Tensor:
        """View with the groups in a dimension of their own: ``(groups, in / groups, out / groups, *kernel)``."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def join(self, weight: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        return weight if self.groups == 1 else weight.flatten(0, 1)

    def expand(self, per_channel: Tensor, split_weight: Tensor) -> Tensor:
        """View of ``(channels,)`` values that broadcasts to a weight as :meth:`split` returns it."""
        shape = [1] * split_weight.dim()
        if self.groups == 1:
            shape[self.dim] = -1
        else:
            shape[0], shape[self.dim + 1] = self.groups, -1
        return per_channel.view(shape)

    def arrange(self, x: Tensor, raw_depth: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of q for a weight, its raw depths ``(channels,)`` and its exponents ``(channels,)``."""
        split = self.split(x)
        return split, self.expand(bit_depth(raw_depth), split), self.expand(exponent, split)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each channel, each ``(channels,)``."""
        split = self.split(whole(weight.detach()))
        kept = {self.dim} if self.groups == 1 else {0, self.dim + 1}
        within = tuple(d for d in range(split.dim()) if d not in kept)
        if not within:
            return split.flatten(), split.flatten()
        return split.amin(within).flatten(), split.amax(within).flatten()


COUPLING = "_coupling"  # the attribute of a layer that holds what ``size.coupling`` notes on it


@dataclass(frozen=True)
class QuantizedSpec:
    """How one weight of a layer is quantized: the names of its buffers and where its channels lie.

    Args:
        bit_depth: Name of the layer's buffer of raw bit depths, ``(channels,)``, in bits.
        exponent: Name of the layer's buffer of exponents, ``(channels,)``.
        axis: Where the output channels lie.
        initial_bits: Bit depth the channels started with.
        original_numel: Number of weights before any compression.
        original_channels: Number of output channels before any compression.
    """

    bit_depth: str
    exponent: str
    axis: ChannelAxis
    initial_bits: float
    original_numel: int
    original_channels: int


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may have a part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


class _Cached(NamedTuple):
    value: Tensor
    range: Range
    inputs: tuple[Tensor, Tensor, Tensor]
    stamp: tuple[int, ...]


_steps = 0  # optimizer steps of this process; some optimizers write through `.data`, which no version counter sees


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _is_transformed() -> bool:
    """Whether a compiler, a tracer or a torch.func transform records the operations, and wants plain ones."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
    )


class Quantized(nn.Module):
    """Mixin of every quantized layer; made by :func:`quantized_class`, not by hand.

    The quantized value of a weight is kept until one of its parameters, or the layer's mode, changes. Writes to a
    latent weight through ``.data`` between optimizer steps are the one change that is not seen: call
    :meth:`forget_quantized` after them. As with torch's parametrizations, ``layer.weight`` is computed: what is written
    into it in place is lost at the next step. Write into ``layer.latent("weight")`` instead.

    Attributes:
        release_after_backward: Free the kept value when the gradient arrives. It spares the memory where every
            backward is followed by an optimizer step, and a computation where gradients are accumulated if left off.
        depths_loaded: Whether depths and exponents came from a state dict, so that they are not to be calibrated anew.
        sharded: Whether FSDP2 makes the weights whole for each forward. Read at other times, they are not quantized:
            it is FSDP2 that reads its part.
    """

    release_after_backward = False
    depths_loaded = False
    sharded = False

    _float_class: type[nn.Module]
    _quantized: dict[str, QuantizedSpec]
    _quantized_values: dict[str, _Cached]

    def latent(self, name: str) -> nn.Parameter:
        """The float parameter behind the quantized weight ``name``."""
        return cast(nn.Parameter, self._parameters[name])

    def learned(self, name: str) -> tuple[Tensor, Tensor]:
        """The raw bit depths and the exponents of the weight ``name``, ``(channels,)`` each."""
        spec = self._quantized[name]
        return cast(Tensor, self._buffers[spec.bit_depth]), cast(Tensor, self._buffers[spec.exponent])

    def forget_quantized(self) -> None:
        """Drops the kept quantized weights, so that the next access computes them anew."""
        self._quantized_values.clear()

    def calibrate(self, name: str) -> None:
        """Starts the weight ``name`` anew, with all channels at the initial depth and exponents that fit its range.

        Raises:
            ValueError: If weights are not finite.
        """
        spec, weight = self._quantized[name], self.latent(name)
        raw_depth, exponent = self.learned(name)
        low, high = (t.to(exponent) for t in spec.axis.extremes(weight))
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise ValueError(
                f"Expected finite weights, got NaN or infinity in {name!r} of {self}. Repair the checkpoint or the "
                f"initialization, or leave this layer out with skip=."
            )
        fallback = (spec.axis.channels(weight) / weight.numel()) ** 0.5
        with torch.no_grad():
            exponent.copy_(initial_exponent(low, high, spec.initial_bits, fallback))
            raw_depth.fill_(spec.initial_bits)

    def train(self, mode: bool = True) -> "Quantized":
        """Sets the mode, as every module's ``train``, and forgets the kept weights."""
        self.forget_quantized()
        return super().train(mode)

    def _quantized_weight(self, name: str) -> Tensor:
        axis = self._quantized[name].axis
        x, (b, e) = self.latent(name), self.learned(name)
        if self.sharded and is_sharded(x):
            return x
        own = type(x) is nn.Parameter and type(b) is type(e) is Tensor
        if _is_transformed() or not own:  # functional_call is at work
            learned = (b, e) if x.requires_grad else (b.detach(), e.detach())
            return axis.join(q_composite(*axis.arrange(x, *learned)))
        if x.is_inference():
            return self._quantize((x, b, e), axis)[0]
        kept = self._kept(name, (x, b, e), axis)
        if not torch.is_grad_enabled() or not x.requires_grad:
            # the depths of a frozen weight, or of one toggled off, are frozen as well; torch.matmul asks for the flag
            # without gradients too, and adds up in another order
            return kept.value.requires_grad_(x.requires_grad)
        arrives = partial(self._gradient_arrives, name)
        return axis.join(q_known(axis.split(x), b, e, axis.split(kept.value.detach()), kept.range, arrives))

    def _gradient_arrives(self, name: str) -> None:
        """Frees and clears what a new gradient makes stale, before the gradient of a weight is computed."""
        if self.release_after_backward:
            self._quantized_values.pop(name, None)
        if self.latent(name).grad is None and not self.sharded:  # ``zero_grad`` of a module clears parameters alone
            for tensor in self.learned(name):
                tensor.grad = None

    def _kept(self, name: str, inputs: tuple[Tensor, Tensor, Tensor], axis: ChannelAxis) -> _Cached:
        x, b, e = inputs
        stamp = (_steps, x._version, x.data_ptr(), b._version, b.data_ptr(), e._version, e.data_ptr())
        kept = self._quantized_values.get(name)
        if kept is not None:
            if kept.stamp[0] != kept.value._version:
                warnings.warn(
                    f"Something wrote into the quantized {name!r} of {type(self).__name__}, which is computed: the "
                    f"values are lost. Write into layer.latent({name!r}).",
                    stacklevel=4,
                )
            elif kept.stamp[1:] == stamp and all(a is b for a, b in zip(kept.inputs, inputs, strict=True)):
                return kept
        with torch.inference_mode(False):
            value, known = self._quantize(inputs, axis)
        kept = self._quantized_values[name] = _Cached(value, known, inputs, (value._version, *stamp))
        return kept

    @staticmethod
    @torch.no_grad()
    def _quantize(inputs: tuple[Tensor, Tensor, Tensor], axis: ChannelAxis) -> tuple[Tensor, Range]:
        x, b, e = axis.arrange(*inputs)
        known = Range.of(b, e)
        return axis.join(quantize(x, known)), known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        """Moves or casts the layer; what is learned keeps its identity, as parameters do, and at least 32 bits."""
        self.forget_quantized()
        learned = {id(self._buffers[name]) for name in self._learned_names()}

        def applied(tensor: Tensor) -> Tensor:
            return _applied(fn, tensor) if id(tensor) in learned else fn(tensor)

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        return self

    def _learned_names(self) -> set[str]:
        return {n for spec in self._quantized.values() for n in (spec.bit_depth, spec.exponent)}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        trained = {n: cast(Tensor, self._buffers[n]).requires_grad for n in self._learned_names()}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        for n, was_trained in trained.items():  # assign=True puts the tensors of the state dict in place
            cast(Tensor, self._buffers[n]).requires_grad_(was_trained)
        for name, spec in self._quantized.items():
            own = {prefix + spec.bit_depth, prefix + spec.exponent}
            self.depths_loaded |= own <= state_dict.keys()
            if prefix + name in state_dict and own.isdisjoint(state_dict):
                self.calibrate(name)  # the state of the float network: start from its function
                missing = [key for key in missing if key not in own]
        missing_keys.extend(missing)

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # absent in Python 3.10 unless a base class defines it
        state = dict(inherited() if inherited is not None else self.__dict__)
        state["_quantized_values"] = {}
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._float_class, tuple(self._quantized)), self.__getstate__()


def _applied(fn: Callable[[Tensor], Tensor], learned: Tensor) -> Tensor:
    """A leaf of depths or exponents after ``fn`` has moved or cast it: the same object wherever torch allows that.

    Depths move by hundredths of a bit: they stay float32 whatever the module is cast to.
    """
    with torch.no_grad():
        moved = fn(learned.detach())
        if torch.finfo(moved.dtype).bits < 32:
            moved = learned.detach().to(moved.device, torch.float32)
        gradient, learned.grad = learned.grad, None
        if not torch._has_compatible_shallow_copy_type(learned, moved):
            return moved.detach().requires_grad_(learned.requires_grad)
        learned.data = moved
        learned.grad = gradient.to(moved) if gradient is not None else None
    return learned


class _QuantizedRNN(Quantized):
    """Mixin of quantized recurrent layers, which read their weights from a list and pack that list for cuDNN."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        """Ignored: the list is made anew from the quantized weights whenever it is read."""

    def _update_flat_weights(self) -> None:
        """Nothing to do, see ``_flat_weights``."""

    def flatten_parameters(self) -> None:
        """Nothing to do: quantized weights are new tensors at every step."""


_reader: Callable[[Quantized, str], Tensor] | None = None  # who sees every quantized weight that is read


@contextmanager
def reading_through(reader: Callable[[Quantized, str], Tensor]) -> Iterator[None]:
    """Within this context every quantized weight is read through ``reader(layer, name)``, which computes it."""
    global _reader
    earlier, _reader = _reader, reader
    try:
        yield
    finally:
        _reader = earlier


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[Quantized]] = {}


def _rebuild(float_class: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = quantized_class(float_class, names)
    return made.__new__(made)


def quantized_class(float_class: type[nn.Module], names: tuple[str, ...]) -> type[Quantized]:
    """The class ``Quantized<float_class>`` with a property for each weight in ``names``.

    Args:
        float_class: Class of the layer to be quantized.
        names: Names of its weight parameters.

    Returns:
        A subclass of :class:`Quantized` and ``float_class``, the same one at every call.
    """
    if (float_class, names) in _CLASSES:
        return _CLASSES[float_class, names]

    def weight_property(name: str) -> property:
        def read(self: Quantized) -> Tensor:
            return self._quantized_weight(name) if _reader is None else _reader(self, name)

        return property(read, doc=f"Quantized {name}: q(latent, b, e).")

    mixin = _QuantizedRNN if issubclass(float_class, nn.RNNBase) else Quantized
    body: dict[str, Any] = {name: weight_property(name) for name in names}
    body |= {"_float_class": float_class, "__module__": __name__, "__doc__": f"{float_class.__name__}, quantized."}
    made = cast("type[Quantized]", type(f"Quantized{float_class.__name__}", (mixin, float_class), body))
    return _CLASSES.setdefault((float_class, names), made)
