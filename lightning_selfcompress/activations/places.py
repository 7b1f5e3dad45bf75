"""Where a network's activations are quantized: found in a step that is run once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, avg_pool2d, avg_pool3d
from torch.overrides import TorchFunctionMode

from lightning_selfcompress.activations.formula import best_exponent, sample
from lightning_selfcompress.activations.layers import INPUT, OUTPUT, Point, activated_class, base_class
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.tensors import tensors_in

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


_JOINS = {torch.cat, torch.concat, torch.concatenate}


_MEANS = {torch.mean, Tensor.mean, avg_pool2d, avg_pool3d, adaptive_avg_pool2d, adaptive_avg_pool3d}


# fmt: off
_NONNEGATIVE = frozenset(  # operations whose results are never negative
    (
        "relu", "relu_", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp"
    )
)


_KEEP_SIGNS = frozenset(  # operations whose results are not negative if no operand is
    (
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "add", "add_",
        "__add__", "__radd__", "__iadd__", "mul", "__mul__", "cat", "concat", "concatenate", "stack", "flatten",
        "reshape", "view", "permute", "transpose", "unsqueeze", "squeeze", "contiguous", "__getitem__", "dropout",
        "pad", "to"
    )
)
# fmt: on


_CLAMPS = frozenset(("hardtanh", "clamp", "clamp_min"))  # whose second argument is the least result


_SOME = 256  # activations of unknown kind of which none is negative, to take it that none ever is


_IMAGES = 4  # dimensions of a tensor from which sums and means are computed in integers


@dataclass(eq=False)
class Seen:
    """What was seen of the activations at one point.

    Args:
        samples: Parts of them, in double precision.
        least: The least of all of them.
        largest: The largest of all of them.
        count: How many there were.
        nonnegative: Whether all come from operations whose results are never negative.
    """

    samples: list[Tensor] = field(default_factory=list)
    least: float = float("inf")
    largest: float = float("-inf")
    count: int = 0
    nonnegative: bool = True

    def add(self, x: Tensor, nonnegative: bool) -> None:
        """Takes up a tensor, and whether the operation that made it never makes a negative one."""
        self.samples.append(sample(x))
        self.count += x.numel()
        self.nonnegative &= nonnegative
        finite = x.detach()[x.detach().isfinite()]
        if finite.numel():
            self.least, self.largest = min(self.least, float(finite.min())), max(self.largest, float(finite.max()))

    def join(self, other: "Seen") -> None:
        """Takes up what was seen elsewhere, or in another run."""
        self.samples += other.samples
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)
        self.count += other.count
        self.nonnegative &= other.nonnegative

    def point(self, where: str, bits: int) -> tuple[Point, float]:
        """Returns the point, and its exponent.

        Codes are signed if any activation was negative, and if another one may be: few were seen, or one number alone,
        as a residual branch returns zeros in the first step if its last normalization starts at zero.
        """
        unknown = self.count < _SOME or self.least >= self.largest
        point = Point(where, self.least < 0 or (unknown and not self.nonnegative), bits)
        return point, best_exponent(torch.cat(self.samples), bits, point.signed)


Places = dict[tuple[str, str], Seen]  # path of a module, "input" or "output" -> what was seen there


def find_points(model: nn.Module, run: Callable[[], Any]) -> Places:
    """Runs a network once, and returns where its activations have to be quantized for integer kernels.

    These are the inputs of linear layers and convolutions, and in networks of images the operands of sums and
    concatenations, and what is averaged, within modules that hold such layers: a mean that a loss takes is none. Each
    is quantized at the output of the innermost module that returns it and runs once in each call of the module around
    it, so that all that read it read the same. Where no such module returns it, or the layer that reads it reads other
    tensors as well, it is quantized at the input of that layer, or of the outermost module that takes it if it is an
    operand. Outputs of the network stay as they are, and so do inputs that are whole numbers.

    Args:
        model: The network. Of a converted network the quantized layers count, of any other all layers.
        run: A function that runs it.

    Returns:
        The places, each with the activations seen there.
    """
    with _Finder(model) as finder:
        run()
    return finder.places()


class _Finder(TorchFunctionMode):
    """Notes which module made a tensor, and which tensors are to be quantized."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._made: dict[tuple[int, int], list[str]] = {}  # innermost first
        self._taken: dict[tuple[int, int], list[str]] = {}  # outermost first
        self._nonnegative: set[tuple[int, int]] = set()
        self._calls: Counter[str] = Counter()
        self._depth = 0  # of calls of modules with layers
        self._wanted: list[tuple[tuple[int, int], str | None, Seen]] = []
        self._kept: list[Tensor] = []  # so that no id is used again
        self._handles: list[Any] = []

    def __enter__(self) -> "_Finder":
        layers = dict(_layers(self._model))
        for path, module in self._model.named_modules():
            holds_layers = any(isinstance(part, LAYERS) for part in module.modules())
            self._handles.append(module.register_forward_pre_hook(self._entering(path, holds_layers)))
            self._handles.append(module.register_forward_hook(self._leaving(holds_layers), always_call=True))
            if path and can_be_activated(module):
                self._handles.append(module.register_forward_hook(self._noting(path)))
                self._handles.append(module.register_forward_pre_hook(self._taking(path), with_kwargs=True))
            if path in layers and can_be_activated(module):
                self._handles.append(module.register_forward_pre_hook(self._wanting(path), with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        operands: tuple[Any, ...] = ()
        if not self._depth:
            pass  # a loss
        elif func in _SUMS:
            operands = tuple(args[:2])
        elif func in _JOINS and args:
            operands = tuple(args[0])
        elif func in _MEANS:
            operands = tuple(args[:1])
        if all(isinstance(t, Tensor) and t.dim() >= _IMAGES and not isinstance(t, nn.Parameter) for t in operands):
            for tensor in operands:
                self._want(tensor, None)
        name, given = getattr(func, "__name__", ""), tensors_in((args, kwargs))
        keeps = name in _KEEP_SIGNS and all(self._is_nonnegative(t) for t in given)  # before what is done in place
        out = func(*args, **(kwargs or {}))
        least = (kwargs or {}).get("min_val", (kwargs or {}).get("min", args[1] if len(args) > 1 else None))
        clamped = name in _CLAMPS and isinstance(least, int | float) and least >= 0
        if isinstance(out, Tensor) and (keeps or clamped or name in _NONNEGATIVE):
            self._nonnegative.add(self._key(out))
        return out

    def _is_nonnegative(self, tensor: Tensor) -> bool:
        return (id(tensor), tensor._version) in self._nonnegative

    def places(self) -> Places:
        """Returns the places of what was wanted."""
        found: Places = {}
        operands = {key for key, reader, _ in self._wanted if reader is None}
        makers_of = {key: [p for p in made if self._is_called_once(p)] for key, made in self._made.items()}
        partly = {reader for key, reader, _ in self._wanted if not makers_of.get(key)}  # read what no module makes
        for key, reader, seen in self._wanted:
            makers = makers_of.get(key, []) if reader is None or reader not in partly else []
            takers = [p for p in self._taken.get(key, ()) if self._is_called_once(p) and key in operands]
            takers += [reader] if reader is not None else []
            place = (makers[0], OUTPUT) if makers else (takers[0], INPUT) if takers else None
            if place is not None:
                found.setdefault(place, Seen()).join(seen)
        return found

    def _want(self, tensor: Tensor, reader: str | None) -> None:
        if tensor.is_floating_point() and tensor.numel():
            seen = Seen()
            with torch._C.DisableTorchFunction():
                seen.add(tensor, self._is_nonnegative(tensor))
            self._wanted.append((self._key(tensor), reader, seen))

    def _key(self, tensor: Tensor) -> tuple[int, int]:
        self._kept.append(tensor)
        return id(tensor), tensor._version

    def _is_called_once(self, path: str) -> bool:
        """Returns whether a module runs once in each call of the module around it, so that one step size does."""
        around = path
        while around:
            around = around.rpartition(".")[0]
            if self._calls[around]:
                return self._calls[path] == self._calls[around]
        return self._calls[path] == 1 or any(True for _ in self._model.get_submodule(path).children())

    def _entering(self, path: str, holds_layers: bool) -> Callable[..., None]:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._calls[path] += 1
            self._depth += holds_layers

        return enter

    def _leaving(self, holds_layers: bool) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            self._depth -= holds_layers

        return leave

    def _noting(self, path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                self._made.setdefault(self._key(out), []).append(path)

        return note

    def _taking(self, path: str) -> Callable[..., None]:
        def take(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (*args, *kwargs.values())
            if given and isinstance(given[0], Tensor):
                self._taken.setdefault(self._key(given[0]), []).append(path)

        return take

    def _wanting(self, path: str) -> Callable[..., None]:
        def want(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (*args, *kwargs.values())
            if given and isinstance(given[0], Tensor):
                self._want(given[0], path)

        return want


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers whose inputs are wanted: the quantized ones, or all where none is."""
    quantized = any(isinstance(m, Quantized) for m in model.modules())
    for path, module in model.named_modules():
        if path and isinstance(module, LAYERS) and (isinstance(module, Quantized) or not quantized):
            yield path, module


def layers_left(model: nn.Module) -> list[str]:
    """Returns the layers whose inputs stay in float because the layer has a ``forward`` of its own.

    Args:
        model: The network that :func:`find_points` is given.

    Returns:
        Their paths.
    """
    return [path for path, module in _layers(model) if not can_be_activated(module)]


def can_be_activated(module: nn.Module) -> bool:
    """Returns whether a module's activations can be quantized: its class allows it, and its ``forward`` is the class's.

    Args:
        module: Any module.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule | nn.ModuleList | nn.ModuleDict):
        return False
    try:
        kind = module._float_class if isinstance(module, Quantized) else base_class(module)
        activated_class(getattr(kind, "_base", kind))
    except Exception:  # code of the class may raise anything where another class is derived from it
        return False
    return True
