"""The Watcher, which finds the channels of a network by watching the operations of its training steps."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_selfcompress.channels.atoms import AtomStore, Axis, Dims, everywhere
from lightning_selfcompress.channels.call import Call, writes_out, written_arguments
from lightning_selfcompress.channels.channels import Channels, Slot
from lightning_selfcompress.channels.dispatch import ShowScaledAttention, showing, unwatched
from lightning_selfcompress.channels.fading_buffers import FadingBuffers
from lightning_selfcompress.channels.grids import grouped, numbered, recall_cells
from lightning_selfcompress.channels.layout import Constant, Layout, Storage, overwritten, shares_memory
from lightning_selfcompress.channels.optimizer_steps import OptimizerSteps
from lightning_selfcompress.channels.places import Places, in_streams
from lightning_selfcompress.channels.recurrent import tie_states
from lightning_selfcompress.channels.rules import RULES, STARTING, moves, pointwise, products
from lightning_selfcompress.quantize.layers import Quantized, reading_through
from lightning_selfcompress.quantize.parameters import QuantizedParameter, attributes_of, quantized_parameters
from lightning_selfcompress.tensors import (
    is_bare_norm,
    name_of,
    own_tensors,
    put_on,
    size_attribute,
    stored_tensors,
    tensors_in,
)

_ADDING = frozenset({"add", "sub", "stack", "cat"})  # the operations that add a penalty to the loss


_COPIES = frozenset({"_to_copy", "clone", "detach", "alias"})


_BOOKKEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers"}  # hooks and the like, which hold no tensors


_LAYOUT = "_selfcompress_layout"  # the attribute of a tensor that holds its layout; an id would be reused


class Watcher:
    """Reads the channels of a network from training steps; it combines the ties and pins of all watched steps.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_selfcompress import convert
    >>> from lightning_selfcompress.channels import Watcher
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> plan = convert(net)
    >>> watcher = Watcher(net)
    >>> with watcher:  # run any training step
    ...     out = net(torch.randn(3, 4))
    >>> int(watcher.channels().removable().sum())
    6

    The watcher leaves no hook and no attribute behind, and draws no random numbers. An error in a rule pins the
    channels of the operation's arguments and never reaches the training.

    Args:
        model: A converted module.
        earlier: The channels of the same module that were found in earlier steps.

    Attributes:
        failures: What rules raised.
        without_rule: Names of the operations that have no rule.
        ran_forward: Whether a watched step ran the network's own ``forward``.
    """

    def __init__(self, model: nn.Module, *, earlier: Channels | None = None) -> None:
        self.model = model
        self.failures: list[str] = []
        self.without_rule: set[str] = set()
        self.ran_forward = False
        self._store = AtomStore()
        self._slots: list[Slot] = []
        self._stored: dict[int, Layout] = {}  # by the id of a parameter or buffer, which lives as long as the model
        self._weights: dict[tuple[int, str], Layout] = {}  # by the id of the latent weight and the weight's name
        self._sizes: dict[nn.Module, Axis] = {}  # normalization layers without tensors, whose size is an attribute
        self._buffers = FadingBuffers(self._store)
        self._unseen: dict[int, str] = {}
        self._passive: dict[int, str] = {}  # parameters that no step has run with gradients
        self._parameters: dict[int, str] = {}
        self._in_step: set[str] = set()
        self._labelled: list[weakref.ref[Tensor]] = []
        self._exit = ExitStack()
        self._steps, self._places = OptimizerSteps(), Places()
        self._name_atoms()
        if earlier is not None:
            self._recall(earlier)

    def channels(self) -> Channels:
        """Returns the channels that the watched steps have shown so far."""
        found = grouped(self._store)
        group = found.group[: 1 + sum(slot.size for slot in self._slots)]  # without those of grids and of new tensors
        cells, pinned = numbered(found, int(group.max()) + 1)
        pinned = in_streams(pinned, group, self._slots)
        names = set(self._unseen.values())
        trained = {n for n, p in self.model.named_parameters() if n in names and p.requires_grad} if names else set()
        unseen = tuple(n for n in self._unseen.values() if n in trained)
        untouched = tuple(n for n in self._unseen.values() if n not in trained)
        slots, passive = self._buffers.noted(self._slots), tuple(self._passive.values())
        return Channels(slots, group, pinned, unseen, untouched, passive, cells)

    def kind(self) -> frozenset[str]:
        """Returns the names of the operations and parameters of the last step, by which kinds of steps differ."""
        return frozenset(self._in_step)

    def __enter__(self) -> "Watcher":
        self._in_step.clear()
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(reading_through(self._read))
            for module in self._sizes:
                stack.callback(module.register_forward_pre_hook(self._tie_size).remove)
            stack.enter_context(self._places.followed(self.model))
            stack.enter_context(self._outputs_pinned())
            stack.enter_context(self._steps.noticed())
            stack.enter_context(ShowScaledAttention(self._scaled))
            stack.enter_context(showing(self._visit))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._pin_kept()
            self._buffers.note_replaced(stored_tensors(self.model))
        self._exit.__exit__(kind, error, trace)

    def pin_outputs(self, outputs: Any, what: str) -> None:
        """Pins the channels of tensors that code outside the network uses.

        Args:
            outputs: A tensor, or nested lists, tuples, mappings and dataclasses of tensors.
            what: The reason that is given for the pinned channels.
        """
        for tensor in tensors_in(outputs):
            layout = self._layout(tensor)
            if layout is None:
                continue
            if layout.constant is not None and not layout.constant.reduced:
                self._meets_data(layout.constant)
            for dim in (*layout.dims, layout.produced):
                if isinstance(dim, Axis):
                    self._store.pin(dim.atoms, what)

    def _pin_kept(self) -> None:
        """Pins what modules keep of the step in their attributes, for nobody knows what they do with it later."""
        for path, module in self.model.named_modules():
            for name, value in attributes_of(module):
                kept = [t for t in tensors_in(value) if id(t) not in self._stored]
                self.pin_outputs(kept, f"{name_of(path, name)!r} keeps it after the step")

    def _name_atoms(self) -> None:
        weights = list(quantized_parameters(self.model))
        is_depth = {id(t): t is w.raw_depth for w in weights for t in (*w.learned, w.latent)}
        saved = {id(t) for t in stored_tensors(self.model, transient=False).values()}
        for name, tensor in stored_tensors(self.model).items():
            self._add(name, tensor, is_depth)
            for dim in self._stored[id(tensor)]._dims if id(tensor) not in saved else ():
                if isinstance(dim, Axis):  # a new network could not tell which entries are left
                    self._store.pin(dim.atoms, f"{name!r} has them, a buffer that is not saved")
        for weight in weights:
            self._add_quantized(weight)

        for path, module in self.model.named_modules():
            if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                tie_states(self._store, module, {name: self._stored[id(t)]._dims for name, t in own_tensors(module)})
            if is_bare_norm(module):
                name = name_of(path, size_attribute(module))
                size = getattr(module, size_attribute(module))
                self._sizes[module] = Axis(self._store.new(size), np.ones(size, bool))
                self._slots.append(Slot(name, 0, size, self._store.count - size, attribute=True))
                if isinstance(module, nn.GroupNorm):  # a loaded network would group other channels
                    self._store.pin(self._sizes[module].atoms, f"{path!r} has groups of them, which no file could tell")

    def _recall(self, earlier: Channels) -> None:
        _, first, which = np.unique(earlier.group, return_index=True, return_inverse=True)
        self._store.tie(np.arange(1, self._store.count), first[which][1:], "it is in no channel")
        by_reason: dict[str, list[int]] = {}
        for number, reason in earlier.pinned.items():
            by_reason.setdefault(reason, []).append(number)
        for reason, numbers in by_reason.items():
            self._store.pin(np.flatnonzero(np.isin(earlier.group, numbers)), reason)
        recall_cells(self._store, earlier)
        unseen = {*earlier.unseen, *earlier.untouched}
        self._unseen = {key: name for key, name in self._unseen.items() if name in unseen}
        self._passive = {key: name for key, name in self._passive.items() if name in earlier.passive}
        self._buffers.recall(earlier.slots)

    def _add(self, name: str, tensor: Tensor, is_depth: Mapping[int, bool]) -> None:
        """Adds one tensor; ``is_depth`` maps the ids of a quantized weight's tensors to whether they are bit depths."""
        is_parameter = isinstance(tensor, nn.Parameter)
        fades = is_parameter and sum(n > 1 for n in tensor.shape) == 1
        slot_fades, produces = fades and id(tensor) not in is_depth, is_depth.get(id(tensor), False)
        own = not is_parameter and id(tensor) not in is_depth
        fading = self._buffers.add(name, tensor) if own else frozenset()
        dims = []
        for d, size in enumerate(tensor.shape):
            self._slots.append(Slot(name, d, size, self._store.count, produces, slot_fades and size > 1))
            dims.append(Axis(self._store.new(size), everywhere(fades, size), fading))
        constant = Constant(frozenset({id(tensor)})) if is_parameter else None
        layout = Layout(tuple(dims), Storage(), constant=constant, stored=True)
        self._stored[id(tensor)] = layout
        if is_parameter and tensor.numel():
            self._parameters[id(tensor)] = self._unseen[id(tensor)] = self._passive[id(tensor)] = name

    def _add_quantized(self, weight: QuantizedParameter) -> None:
        """Adds a quantized weight: its bit depths produce channels, and its value is zero where a bit depth is zero."""
        spec, latent = weight.spec, weight.latent
        depth, exponent = (self._stored[id(t)]._dims[0] for t in weight.learned)
        dims = [d.with_zero(False) if isinstance(d, Axis) else d for d in self._stored[id(latent)]._dims]
        self._stored[id(latent)]._dims = tuple(dims)
        if not isinstance(depth, Axis) or not isinstance(exponent, Axis):
            return  # a single channel, which is never removed
        self._store.tie(depth.atoms, exponent.atoms, "")
        axis, groups = dims[spec.axis.dim], spec.axis.groups
        in_convolution = groups > 1 and isinstance(weight.layer, nn.modules.conv._ConvNd)
        if not in_convolution and isinstance(axis, Axis):
            self._store.tie(axis.atoms if groups == 1 else axis.tile(groups).atoms, depth.atoms, "")
            dims[spec.axis.dim] = axis.with_zero(True)
        if groups > 1 and not in_convolution:  # experts or heads, each of which has a bit depth for every channel
            if not isinstance(axis, Axis):
                self._store.pin(depth.atoms, f"{weight.name!r} has a single channel in each of them")
            dims[0] = None
        produced = depth.with_zero(True) if in_convolution else None
        constant = self._stored[id(latent)].constant
        layout = Layout(tuple(dims), Storage(), constant=constant, produced=produced, stored=True)
        self._weights[id(latent), weight.weight_name] = layout

    def _read(self, layer: Quantized, name: str) -> Tensor:
        """Computes a quantized weight without watching the operations, since its channels are known."""
        latent = layer.latent(name)
        with unwatched():
            value = layer._quantized_weight(name)
        known = self._weights.get((id(latent), name))
        self._set(value, known if known is not None else self._stored.get(id(latent)))
        return value

    @contextmanager
    def _outputs_pinned(self) -> Iterator[None]:
        """Pins what ``forward`` of the network returns, whether the network or its ``forward`` is called."""
        forward = self.model.forward

        @wraps(forward)
        def pinning(*args: Any, **kwargs: Any) -> Any:
            self.ran_forward = True
            outputs = forward(*args, **kwargs)
            self.pin_outputs(outputs, "it is an output of the network")
            return outputs

        take_off = put_on(self.model, "forward", pinning)
        try:
            yield
        finally:
            take_off()

    def _tie_size(self, module: nn.Module, args: Any) -> None:
        """Ties the size of a normalization layer without tensors to the channels of its input."""
        layout = self._layout(args[0]) if args else None
        dim = layout.dims[1] if layout is not None else None
        axis = self._sizes[module]
        if isinstance(dim, Axis) and len(dim) == len(axis):
            self._store.tie(dim.atoms, axis.atoms, "")

    def _visit(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self._steps.running:
            return
        try:
            call = Call(func, args, kwargs, out, self._store, self._layout, self._places.of)
            inputs = [(t, known) for t, known in zip(call.inputs, call.layouts, strict=True) if known is not None]
            self._in_step.add(call.name)
            if inputs or call.name in STARTING:
                result = self._apply_rule(call)
                produced = self._produced(call, inputs)
                self._settle(call, result)
                self._label(call, inputs, result, produced)
        except Exception as error:  # an error in a rule must not end the training
            reason = f"{func}: {type(error).__name__}: {error}"
            self.failures.append(reason)
            for tensor in tensors_in([list(args), kwargs]):
                self.pin_outputs(tensor, reason)

    def _scaled(self, query: Tensor) -> None:
        layout = self._layout(query)
        if layout is not None and isinstance(layout.dims[-1], Axis):
            reason = f"{self._places.of('scaled_dot_product_attention')} scales by the number of channels"
            self._store.pin(layout.dims[-1].atoms, reason)

    def _apply_rule(self, call: Call) -> list[Dims | None]:
        rule = RULES.get(call.name) or RULES.get(call.name.rstrip("_"))
        if rule is None and pointwise.is_pointwise(call.func):
            rule = pointwise.pointwise
        if rule is None or not call.outputs or writes_out(call.func):
            self.without_rule.add(call.name)
            self._lose_written(call)
            return call.pin_all("has no rule")
        return rule(call)

    def _lose_written(self, call: Call) -> None:
        """Forgets the channels of arguments that an operation without a rule writes to."""
        for name in written_arguments(call.func):
            for tensor in tensors_in(call[name]):
                layout = self._layout(tensor)
                if layout is not None and id(tensor) not in self._stored:
                    layout.storage.lose()
                    layout.storage.lose_around()

    def _produced(self, call: Call, inputs: list[tuple[Tensor, Layout]]) -> Axis | None:
        """Returns the bit depths of a copied weight in groups; only copies and convolutions do not pin it."""
        found = [layout for _, layout in inputs if layout.produced is not None]
        if call.name in _COPIES:
            return found[0].produced if found else None
        for layout in found if call.name not in products.CONVOLUTIONS else ():
            for dim in (*layout.dims, layout.produced):
                call.pin_or_owe(dim, "is applied to a weight in groups")
        return None

    def _settle(self, call: Call, result: list[Dims | None]) -> None:
        """Marks inputs computed from parameters alone as combined with data, except a penalty that joins the loss."""
        constants = [known.constant for known in call.layouts if known is not None and known.constant is not None]
        data = [t for t, known in zip(call.inputs, call.layouts, strict=True) if known is None or not known.constant]
        if not constants or (not data and None not in result):
            return
        joins_loss = call.name.rstrip("_") in _ADDING and all(t.numel() == 1 for t in data)
        for constant in constants:
            if not (joins_loss and constant.reduced):
                self._meets_data(constant)

    def _meets_data(self, constant: Constant) -> None:
        for key in constant.parameters:
            self._in_step.add(self._parameters[key])
            self._unseen.pop(key, None)
            if torch.is_grad_enabled():
                self._passive.pop(key, None)
        for atoms, reason in constant.owed:
            self._store.pin(atoms, reason)

    def _label(
        self, call: Call, inputs: list[tuple[Tensor, Layout]], result: list[Dims | None], produced: Axis | None
    ) -> None:
        constant = call.constant
        for tensor, dims in zip(call.outputs, result, strict=True):
            before = self._layout(tensor)
            if before is not None and before.stored:
                self._buffers.note_written(before._dims, dims)
            if id(tensor) in self._stored:
                continue  # parameters and buffers keep their layouts
            if dims is not None and len(dims) != tensor.dim():
                raise ValueError(f"{len(dims)} dimensions for a tensor of {tensor.dim()}")
            if before is not None:
                now = dims if dims is not None else (None,) * tensor.dim()
                self._set(tensor, overwritten(before, now, constant, self._store, stored=call.stored))
                continue
            alias = next((known for t, known in inputs if shares_memory(t, tensor)), None)
            computed = constant is not None or call.stored or call.makes_nought
            if dims is not None and (alias is not None or computed or any(d is not None for d in dims)):
                storage = Storage() if alias is None else alias.storage
                storage = Storage(storage) if call.name in moves.APART else storage
                new = Layout(
                    dims, storage, constant=constant, produced=produced, is_nought=call.makes_nought, stored=call.stored
                )
                self._set(tensor, new)

    def _layout(self, tensor: Tensor) -> Layout | None:
        layout: Layout | None = tensor.__dict__.get(_LAYOUT) if hasattr(tensor, "__dict__") else None
        if layout is not None:
            return layout
        return self._stored.get(id(tensor))

    def _set(self, tensor: Tensor, layout: Layout | None) -> None:
        if layout is not None:
            tensor.__dict__[_LAYOUT] = layout
            self._labelled.append(weakref.ref(tensor))

    def _forget(self) -> None:
        for reference in self._labelled:
            tensor = reference()
            if tensor is not None:
                tensor.__dict__.pop(_LAYOUT, None)
        self._labelled.clear()
        for module in self.model.modules():  # a weak reference may be cleared although a module keeps the tensor
            for tensor in tensors_in([value for name, value in vars(module).items() if name not in _BOOKKEEPING]):
                tensor.__dict__.pop(_LAYOUT, None)
