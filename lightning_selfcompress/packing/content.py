"""What is stored of a model: the integer codes of its weights, and all other tensors unchanged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, codes, step_size
from lightning_selfcompress.quantize.layers import ChannelAxis, whole
from lightning_selfcompress.quantize.parameters import learned_tensors, quantized_parameters
from lightning_selfcompress.tensors import is_bare_norm, name_of, stored_tensors

_WIDEST = 2147483520.0  # the largest code in float32 that tokens have room for


EXPONENT_LIMIT = 128 * EXPONENT_STEPS  # exponents are sixteenths from -limit to limit - 1, as ``step_size`` has them


DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@dataclass(frozen=True, eq=False)
class Codes:
    """The integer codes of a weight. Channels whose codes are all 0 take no memory here.

    Args:
        axis: Where the output channels lie.
        alive: Which channels have a code that is not 0, ``(channels,)``, bool.
        living: Codes of these channels, a row for each, ``(channels alive, weights per channel)``, integers.
        exponents: log2 of the step between levels of each channel in sixteenths, ``(channels,)``, int16.
    """

    axis: ChannelAxis
    alive: NDArray[Any]
    living: NDArray[Any]
    exponents: NDArray[Any]

    @property
    def rows(self) -> NDArray[Any]:
        """The codes of all channels, ``(channels, weights per channel)``."""
        rows = np.zeros((len(self.alive), self.living.shape[1]), self.living.dtype)
        rows[self.alive] = self.living
        return rows

    def same_as(self, other: "Codes") -> bool:
        """Whether both say the same of each weight of a shape."""
        steps = self.exponents[self.alive], other.exponents[other.alive]
        pairs = ((self.alive, other.alive), (self.living, other.living), steps)
        return self.axis == other.axis and all(np.array_equal(a, b) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One parameter or buffer.

    Args:
        name: Its path in the model.
        dtype: Its dtype there.
        shape: Its shape there.
        values: Its values, unless it is coded.
        half: Whether the values are stored in float16.
        codes: Its codes, if it is coded.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Tensor | None = None
    half: bool = False
    codes: Codes | None = None

    def tensor(self) -> Tensor:
        """The tensor itself, dequantized if it is coded."""
        if self.codes is None:
            assert self.values is not None
            return self.values
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        step = step_size(torch.from_numpy(self.codes.exponents).to(wide) / EXPONENT_STEPS)
        rows = torch.from_numpy(self.codes.rows).to(wide) * step[:, None]
        return from_rows(rows.to(self.dtype), self.codes.axis, self.shape)


def to_rows(weight: Tensor, axis: ChannelAxis) -> Tensor:
    """The weights of each output channel in a row, ``(channels, weights per channel)``."""
    if axis.groups == 1:
        return weight.movedim(axis.dim, 0).flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
    return axis.split(weight).movedim(axis.dim + 1, 1).flatten(0, 1).flatten(1)


def from_rows(rows: Tensor, axis: ChannelAxis, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`to_rows`, contiguous."""
    if axis.groups == 1:
        moved = [shape[axis.dim], *(n for d, n in enumerate(shape) if d != axis.dim)]
        return rows.reshape(moved).movedim(0, axis.dim).contiguous()
    inner = [n for d, n in enumerate(shape) if d not in (0, axis.dim)]
    split = rows.reshape(axis.groups, shape[axis.dim], shape[0] // axis.groups, *inner)
    return axis.join(split.movedim(1, axis.dim + 1)).contiguous()


@dataclass(frozen=True, eq=False)
class Packed:
    """All that is stored of a model.

    Args:
        tensors: Parameters and buffers in the order of the model's modules.
        attributes: Whole numbers that modules keep and shapes do not tell, by path: ``"conv.groups"``.
    """

    tensors: tuple[PackedTensor, ...]
    attributes: Mapping[str, int]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, *, half: bool = False, measured: bool = False) -> "Packed":
        """Reads a model, converted or not.

        Args:
            model: Any module; buffers that are not persistent are left out.
            half: Whether float32 values that are not coded are rounded to float16, where that changes none of them
                by more than a thousandth.
            measured: Whether it is for the sizes alone: what no file could hold counts all the same.

        Raises:
            ValueError: If the format has no place for a tensor, unless it is for the sizes alone.
        """
        parameters = tuple(quantized_parameters(model))
        coded = {id(p.latent): p for p in parameters}
        learned = learned_tensors(model)
        found = []
        for name, tensor in stored_tensors(model, transient=False).items():
            if id(tensor) in coded and tensor.numel():
                p = coded[id(tensor)]
                found.append(as_codes(name, p.latent, p.spec.axis, *p.learned))
            elif id(tensor) not in learned:
                values = whole(tensor.detach()).cpu()
                found.append(as_it_is(name, as_bytes(values) if measured else values, half=half))
        return cls(tuple(found), dict(attributes(model)))

    @property
    def coded(self) -> tuple[PackedTensor, ...]:
        """The tensors that are stored as codes."""
        return tuple(t for t in self.tensors if t.codes is not None)


def as_codes(
    name: str,
    weight: Tensor,  # with entries
    axis: ChannelAxis,
    raw_depth: Tensor,  # (channels,)
    exponent: Tensor,  # (channels,)
) -> PackedTensor:
    """A weight as the codes that its channels' depths and exponents make of it."""
    latent, exponent = whole(weight.detach()), exponent.detach()
    x, b, e = axis.arrange(latent, raw_depth.detach(), exponent)
    # a network that is lost, or has steps far too small, is still measured; export compares before it writes
    rows = to_rows(axis.join(codes(x, b, e)), axis).nan_to_num_(0).clamp_(-_WIDEST, _WIDEST).cpu()
    widest = int(rows.abs().max())
    dtype = np.int8 if widest < 128 else np.int16 if widest < 1 << 15 else np.int32
    alive = rows.any(1)
    sixteenths = (exponent * EXPONENT_STEPS).round().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT - 1)
    found = Codes(axis, alive.numpy(), rows[alive].numpy().astype(dtype), sixteenths.cpu().numpy().astype(np.int16))
    return PackedTensor(name, latent.dtype, tuple(latent.shape), codes=found)


def as_it_is(name: str, tensor: Tensor, *, half: bool = False) -> PackedTensor:
    """A tensor that is not coded: in float16 where that loses nothing, or little and ``half`` is wanted.

    Raises:
        ValueError: If the format has no place for its dtype, or it is sparse.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"Expected {name!r} to be a dense tensor, got {tensor.layout}. Call to_dense() on it first.")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"Expected {name!r} of one of the types {known}, got {tensor.dtype}. Convert it first.")
    values = tensor.contiguous().resolve_conj().resolve_neg()
    if values.dtype == torch.float32:
        rounded = values.half().float()
        close = torch.allclose(rounded, values, rtol=1e-3, atol=0) if half else torch.equal(rounded, values)
        if close:
            return PackedTensor(name, values.dtype, tuple(values.shape), rounded, half=True)
    return PackedTensor(name, values.dtype, tuple(values.shape), values)


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor itself, or as many bytes if no file could hold it."""
    if tensor.layout == torch.strided and tensor.dtype in DTYPES:
        return tensor
    return torch.zeros(tensor.numel() * tensor.element_size(), dtype=torch.uint8)


def attributes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Whole numbers that a model's modules keep and shapes do not tell, by path."""
    for path, module in model.named_modules():
        name = kept_number(module)
        value = int(getattr(module, name)) if name else 1
        if value > 1 or name not in ("", "groups"):  # 1 group goes without saying
            yield name_of(path, name), value


def kept_number(module: nn.Module) -> str:
    """Name of the whole number that a module keeps and shapes do not tell; empty if there is none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "groups"
    if isinstance(module, nn.GroupNorm):
        return "num_groups"
    return "num_features" if is_bare_norm(module) else ""


def is_half(floats: torch.dtype) -> bool:
    """Whether values that are not quantized are to be stored in float16.

    Raises:
        ValueError: If it is neither that nor float32.
    """
    if floats not in (torch.float32, torch.float16):
        raise ValueError(f"Expected floats to be torch.float32 or torch.float16, got {floats!r}.")
    return floats == torch.float16
