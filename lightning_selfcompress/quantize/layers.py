"""Quantized layers: the same objects with another class, whose weight attributes return the quantized tensors.

``layer.__class__`` becomes a class made of :class:`Quantized` and the layer's own class. The latent weight stays in
``layer._parameters["weight"]``, and the attribute ``layer.weight`` returns q(latent, b, e). So the layer keeps its
identity, its ``forward``, its hooks and its state-dict keys. The raw bit depths and the exponents are added to it as
buffers that require gradients: ``parameters()`` lists the same objects before and after a conversion, so penalties,
clamps, norms and moving averages over all parameters see the float network.
"""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.computed_weight import ComputedWeight
from lightning_selfcompress.quantize.formula import Range, initial_exponent, q_composite, q_known, quantize
from lightning_selfcompress.tensors import is_sharded, whole

AXIS_KEY = "channel_axis"  # how the keys of axes end in a state dict


def axis_key(depth_name: str) -> str:
    """Returns the key under which a state dict holds the axis of the weight whose raw bit depths have this name."""
    return depth_name.removesuffix("bit_depth") + AXIS_KEY


COUPLING = "_coupling"  # the layer attribute in which ``size.coupling`` keeps its notes


@dataclass(frozen=True)
class QuantizedSpec:
    """The description of how one weight of a layer is quantized.

    Args:
        bit_depth: Name of the layer's buffer of raw bit depths, ``(channels,)``, in bits.
        exponent: Name of the layer's buffer of exponents, ``(channels,)``.
        axis: Position of the output channels in the weight.
        initial_bits: Bit depth of all channels at the start.
        original_numel: Number of weights before any compression.
        original_channels: Number of output channels before any compression.
        saves_axis: Whether state dicts hold the axis, since torch's own layer types do not tell it.
    """

    bit_depth: str
    exponent: str
    axis: ChannelAxis
    initial_bits: float
    original_numel: int
    original_channels: int
    saves_axis: bool = False

    @property
    def learned(self) -> tuple[str, str]:
        """The names of the buffers of raw bit depths and of exponents."""
        return self.bit_depth, self.exponent

    @property
    def axis_key(self) -> str:
        """The key under which a state dict holds the axis, if it does: dimension and groups, in floats."""
        return axis_key(self.bit_depth)


def saved_axis(value: Tensor) -> ChannelAxis | None:
    """Returns the axis that a state dict holds, or None if the value is none."""
    numbers = [round(n) for n in value.flatten().tolist()] if value.is_floating_point() else []
    return ChannelAxis(*numbers) if len(numbers) == 2 and numbers[0] >= 0 and numbers[1] >= 1 else None


class _Cached(NamedTuple):
    value: Tensor
    range: Range
    inputs: tuple[Tensor, Tensor, Tensor]
    stamp: tuple[int, ...]


_counter = itertools.count(1)  # a plain number would lose steps of one thread to another
_steps = 0  # optimizer steps of this process: some optimizers write through `.data`, which changes no version counter


def _count_step(*_: Any) -> None:
    global _steps
    _steps = next(_counter)


register_optimizer_step_post_hook(_count_step)


def _stamp(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[int, ...]:
    x, b, e = inputs
    return (_steps, x._version, x.data_ptr(), b._version, b.data_ptr(), e._version, e.data_ptr())


_TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_transformed() -> bool:
    """Returns whether a compiler, a tracer or a torch.func transform is active, all of which need plain operations.

    ``torch.compiler.is_compiling`` is true in all threads while one of them exports, so the thread's own modes are
    asked as well.
    """
    return bool(
        torch.compiler.is_dynamo_compiling()
        or (torch.compiler.is_compiling() and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)))
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
    )


class Quantized(nn.Module):
    """The mixin of all quantized layers, whose classes :func:`quantized_class` makes.

    The quantized value of a weight is cached until the latent weight, its bit depths or exponents, or the layer's mode
    change, or an optimizer takes a step. A write through ``.data`` between optimizer steps is not noticed: call
    :meth:`forget_quantized` after such a write. ``layer.weight`` is computed, as with torch's parametrizations: what is
    written into it before any training becomes the latent weight (``nn.init`` works), later it is lost with a warning.
    Write into ``layer.latent("weight")`` then.

    Attributes:
        release_after_backward: Whether the cached value is freed in the backward pass. True saves memory if every
            backward pass is followed by an optimizer step; False saves a computation if gradients are accumulated.
        depths_loaded: Whether bit depths and exponents came from a state dict, so that they must not be calibrated.
        pristine: Whether nothing was trained since the conversion, so that a value written into a weight is taken for
            its initialization.
        sharded: Whether FSDP2 gathers the whole weights for each forward. At other times the weight attribute returns
            the latent shard, not quantized, because FSDP2 reads it there.
    """

    release_after_backward = False
    depths_loaded = False
    pristine = True
    sharded = False

    _float_class: type[nn.Module]
    _rebuild: Callable[[type[nn.Module], tuple[str, ...]], nn.Module]
    _quantized: dict[str, QuantizedSpec]
    _quantized_values: dict[str, _Cached]

    def latent(self, name: str) -> nn.Parameter:
        """Returns the latent weight, a float parameter, of the quantized weight ``name``."""
        return cast(nn.Parameter, self._parameters[name])

    def learned(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the raw bit depths and the exponents of the weight ``name``, ``(channels,)`` each."""
        spec = self._quantized[name]
        return cast(Tensor, self._buffers[spec.bit_depth]), cast(Tensor, self._buffers[spec.exponent])

    def known(self, name: str) -> tuple[Tensor, Range]:
        """Returns the value and the range of the weight ``name``, split by groups; the whole of a sharded weight."""
        axis, inputs = self._quantized[name].axis, self._inputs(name)
        if is_sharded(inputs[0]):
            value, known = self._quantize(tuple(map(whole, inputs)), axis)  # type: ignore[arg-type]
        else:
            value, known = self._kept(name, inputs, axis)[:2]
        return axis.split(value.detach()), known

    def forget_quantized(self) -> None:
        """Drops the cached quantized weights, so that the next access computes them again.

        What was written into one of them becomes the latent weight if nothing was trained yet.
        """
        for name, kept in list(self._quantized_values.items()):
            self._heed_writes(name, kept)
        self._quantized_values.clear()

    def _heed_writes(self, name: str, kept: "_Cached") -> None:
        """Takes over what was written into a cached weight, or warns that it is lost."""
        written = kept.stamp[0] != kept.value._version
        if self.pristine and all(a is b for a, b in zip(kept.inputs, self._inputs(name), strict=True)):
            value, _ = self._quantize(kept.inputs, self._quantized[name].axis)  # a write by `.data` has no version
            if kept.stamp[1:] == _stamp(kept.inputs) and not torch.equal(value, kept.value):
                with torch.no_grad():
                    self.latent(name).copy_(kept.value)
                self.calibrate(name)
        elif written:
            warnings.warn(
                f"Something wrote into the quantized {name!r} of {type(self).__name__}, which is computed: the "
                f"values are lost. Write into layer.latent({name!r}).",
                stacklevel=5,
            )

    def _inputs(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return (self.latent(name), *self.learned(name))

    def calibrate(self, name: str) -> None:
        """Resets the weight ``name``: all bit depths to the initial depth, and the exponents to the channels' ranges.

        Raises:
            ValueError: If a weight is not finite.
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
        """Sets the training mode, as in every module, and drops the cached quantized weights."""
        self.forget_quantized()
        return super().train(mode)

    def _quantized_weight(self, name: str) -> Tensor:
        axis = self._quantized[name].axis
        x, (b, e) = self.latent(name), self.learned(name)
        if self.sharded and is_sharded(x):
            return x
        own = type(x) is nn.Parameter and type(b) is type(e) is Tensor
        if is_transformed() or not own:  # torch.func.functional_call has replaced the tensors
            learned = (b, e) if x.requires_grad else (b.detach(), e.detach())
            return axis.join(q_composite(*axis.arrange(x, *learned)))
        if x.is_inference():
            return self._quantize((x, b, e), axis)[0]
        kept = self._kept(name, (x, b, e), axis)
        if not torch.is_grad_enabled() or not x.requires_grad:
            # If the latent weight requires no gradient, its bit depths and exponents get none either. The flag is also
            # set while gradients are disabled, because torch.matmul reads it and then sums in another order.
            return ComputedWeight.of(Tensor.requires_grad_(kept.value, x.requires_grad), x)
        arrives = partial(self._gradient_arrives, name)
        value = axis.join(q_known(axis.split(x), b, e, axis.split(kept.value.detach()), kept.range, arrives))
        return ComputedWeight.of(value, x)

    def _gradient_arrives(self, name: str) -> None:
        """Frees the cached value if wanted, and clears stale gradients of the weight's bit depths and exponents."""
        if self.pristine:
            self.pristine = False
        if self.release_after_backward:
            self._quantized_values.pop(name, None)
        if self.latent(name).grad is None and not self.sharded:  # a module's ``zero_grad`` clears parameters only
            for tensor in self.learned(name):
                tensor.grad = None

    def _kept(self, name: str, inputs: tuple[Tensor, Tensor, Tensor], axis: ChannelAxis) -> _Cached:
        kept = self._quantized_values.get(name)
        if kept is not None:
            same = kept.stamp[1:] == _stamp(inputs) and all(a is b for a, b in zip(kept.inputs, inputs, strict=True))
            if same and kept.stamp[0] == kept.value._version:
                return kept
            self._heed_writes(name, kept)
        stamp = _stamp(inputs)
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
        """Moves or casts the layer; bit depths and exponents keep their identity, and a dtype of at least 32 bits."""
        self.forget_quantized()
        learned = {id(self._buffers[name]) for name in self.learned_names()}

        def applied(tensor: Tensor) -> Tensor:
            return applied_in_float(fn, tensor) if id(tensor) in learned else fn(tensor)

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        return self

    def learned_names(self) -> list[str]:
        """Returns the names of the buffers of raw bit depths and exponents, in the order of the weights."""
        return [n for spec in self._quantized.values() for n in (spec.bit_depth, spec.exponent)]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, spec in self._quantized.items():
            # A class may write ``self.weight`` itself, which is computed, and leave out what it does not know.
            for key, tensor in ((name, self.latent(name)), *zip(spec.learned, self.learned(name), strict=True)):
                destination[prefix + key] = tensor if keep_vars else tensor.detach()
            if spec.saves_axis:  # in floats, since averages over state dicts multiply whatever is in them
                destination[prefix + spec.axis_key] = torch.tensor([float(spec.axis.dim), float(spec.axis.groups)])

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
        unexpected: list[str] = []
        trained = {n: cast(Tensor, self._buffers[n]).requires_grad for n in self.learned_names()}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)
        axes = {prefix + spec.axis_key: spec.axis for spec in self._quantized.values()}
        unexpected_keys.extend(key for key in unexpected if key not in axes)
        for key, axis in axes.items():
            if key in state_dict and (saved := saved_axis(state_dict[key])) != axis:
                error_msgs.append(
                    f"Expected {key!r} to be {axis}, as {self._float_class.__name__} has it, got {saved}."
                )
        for n, was_trained in trained.items():  # assign=True replaces the buffers by tensors of the state dict
            cast(Tensor, self._buffers[n]).requires_grad_(was_trained)
        for name, spec in self._quantized.items():
            own = {prefix + spec.bit_depth, prefix + spec.exponent}
            self.depths_loaded |= own <= state_dict.keys()
            if own <= state_dict.keys():
                self.pristine = False
            if prefix + name in state_dict and own.isdisjoint(state_dict):
                self.calibrate(name)  # the state dict is of the float network: start from its weights
                missing = [key for key in missing if key not in own]
        missing_keys.extend(missing)

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10 has none unless a base class defines it
        state = dict(inherited() if inherited is not None else self.__dict__)
        state["_quantized_values"] = {}
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = self._float_class  # a class that was made on the way is named by what makes it
        return self._rebuild, (getattr(kind, "_made_by", kind), tuple(self._quantized)), self.__getstate__()


def applied_in_float(fn: Callable[[Tensor], Tensor], learned: Tensor) -> Tensor:
    """Moves or casts bit depths or exponents by ``fn``; the result is the same object if torch allows this.

    Bit depths change by hundredths of a bit, so they are float32 even if the module is cast to a narrower dtype.
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
    """The mixin of quantized recurrent layers, which read their weights from a list and pack this list for cuDNN."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        """Ignores the value, because the getter makes the list from the quantized weights at every access."""

    def _update_flat_weights(self) -> None:
        """Does nothing, see ``_flat_weights``."""

    def flatten_parameters(self) -> None:
        """Does nothing, because quantized weights are new tensors at every step."""


class _OfThread(threading.local):
    reader: Callable[[Quantized, str], Tensor] | None = None  # set by reading_through


_of_thread = _OfThread()


def read_weight(layer: Quantized, name: str) -> Tensor:
    """Returns the value of a quantized weight, by the reader of this thread if there is one."""
    reader = _of_thread.reader
    return layer._quantized_weight(name) if reader is None else reader(layer, name)


@contextmanager
def reading_through(reader: Callable[[Quantized, str], Tensor]) -> Iterator[None]:
    """Lets ``reader(layer, name)`` compute every quantized weight that this thread reads within this context."""
    earlier, _of_thread.reader = _of_thread.reader, reader
    try:
        yield
    finally:
        _of_thread.reader = earlier
