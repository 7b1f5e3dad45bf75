"""The stored content of a model: the integer codes of its quantized weights, and the values of all other tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_selfcompress.activations.layers import point_numbers
from lightning_selfcompress.packing.storages import CODED, RAW, storage_of
from lightning_selfcompress.packing.structure import EXPONENT_LIMIT
from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.formula import EXPONENT_STEPS, codes, step_size
from lightning_selfcompress.quantize.parameters import learned_tensors, quantized_parameters
from lightning_selfcompress.tensors import SIZES, is_bare_norm, name_of, stored_tensors, whole

_WIDEST = 2147483520.0  # the largest float32 number that is within the range of tokens


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
    """The integer codes of a weight; ``living`` leaves out the channels whose codes are all 0.

    Args:
        axis: Position of the output channels in the weight.
        alive: Whether each channel has a code that is not 0, ``(channels,)``, bool.
        living: Codes of the alive channels, one row each, ``(channels alive, weights per channel)``, integers.
        exponents: log2 of the step size of each channel, in sixteenths, ``(channels,)``, int16.
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
        """Returns whether both objects store the same values, if they are of weights of the same shape."""
        steps = self.exponents[self.alive], other.exponents[other.alive]
        pairs = ((self.alive, other.alive), (self.living, other.living), steps)
        return self.axis == other.axis and all(np.array_equal(a, b) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One stored parameter or buffer.

    Args:
        name: Path of the tensor in the model.
        dtype: Dtype of the tensor in the model.
        shape: Shape of the tensor in the model.
        values: The values, which may share memory among entries; None if the tensor is coded.
        codes: The codes; None if the tensor is not coded.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Tensor | None = None
    codes: Codes | None = None

    @cached_property
    def storage(self) -> int:
        """The storage in which a file holds the tensor."""
        return CODED if self.values is None else storage_of(self.values)

    def tensor(self) -> Tensor:
        """Returns the tensor, dequantized if it is coded."""
        if self.codes is None:
            assert self.values is not None
            return self.values.contiguous()
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        step = step_size(torch.from_numpy(self.codes.exponents).to(wide) / EXPONENT_STEPS)
        rows = torch.from_numpy(self.codes.rows).to(wide) * step[:, None]
        return from_rows(rows.to(self.dtype), self.codes.axis, self.shape)


def to_rows(weight: Tensor, axis: ChannelAxis) -> Tensor:
    """Arranges the weights of each output channel in a row, ``(channels, weights per channel)``."""
    if axis.groups == 1:
        return weight.movedim(axis.dim, 0).flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
    return axis.split(weight).movedim(axis.dim + 1, 1).flatten(0, 1).flatten(1)


def from_rows(rows: Tensor, axis: ChannelAxis, shape: Sequence[int]) -> Tensor:
    """Undoes :func:`to_rows`; the result has this shape and is contiguous."""
    if axis.groups == 1:
        moved = [shape[axis.dim], *(n for d, n in enumerate(shape) if d != axis.dim)]
        return rows.reshape(moved).movedim(0, axis.dim).contiguous()
    inner = [n for d, n in enumerate(shape) if d not in (0, axis.dim)]
    split = rows.reshape(axis.groups, shape[axis.dim], shape[0] // axis.groups, *inner)
    return axis.join(split.movedim(1, axis.dim + 1)).contiguous()


@dataclass(frozen=True, eq=False)
class Packed:
    """The stored content of a model.

    Args:
        tensors: Parameters and buffers, in the order of the model's modules.
        attributes: Integer attributes of modules that do not follow from shapes, by path, such as ``"conv.groups"``.
    """

    tensors: tuple[PackedTensor, ...]
    attributes: Mapping[str, int]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, *, half: bool = False, measured: bool = False) -> "Packed":
        """Reads the content of a model, which may be a converted model or a float model.

        Args:
            model: Any module; non-persistent buffers are left out.
            half: Whether a float32 tensor that is not coded is rounded to float16 if no value changes by more than a
                thousandth of itself.
            measured: Whether only sizes are needed: a tensor that the format cannot store then counts with its bytes.

        Raises:
            ValueError: If the format cannot store a tensor and ``measured`` is False.
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
    weight: Tensor,  # not empty
    axis: ChannelAxis,
    raw_depth: Tensor,  # (channels,)
    exponent: Tensor,  # (channels,)
) -> PackedTensor:
    """Quantizes a weight to integer codes, with the raw bit depths and exponents of its channels."""
    latent, exponent = whole(weight.detach()), exponent.detach()
    x, b, e = axis.arrange(latent, raw_depth.detach(), exponent)
    # NaN and codes out of range are replaced, so that the size of a diverged network can still be measured. The export
    # compares the codes with the network before it writes a file.
    rows = to_rows(axis.join(codes(x, b, e)), axis).nan_to_num_(0).clamp_(-_WIDEST, _WIDEST).cpu()
    widest = int(rows.abs().max())
    dtype = np.int8 if widest < 128 else np.int16 if widest < 1 << 15 else np.int32
    alive = rows.any(1)
    sixteenths = (exponent * EXPONENT_STEPS).round().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT - 1)
    found = Codes(axis, alive.numpy(), rows[alive].numpy().astype(dtype), sixteenths.cpu().numpy().astype(np.int16))
    return PackedTensor(name, latent.dtype, tuple(latent.shape), codes=found)


def as_it_is(name: str, tensor: Tensor, *, half: bool = False) -> PackedTensor:
    """Stores a tensor without codes; float32 values are rounded to float16 if ``half`` is set and this loses little.

    Values that a file holds exactly in at most two bytes each are not rounded.

    Raises:
        ValueError: If the format has no number for the dtype, or the tensor is not dense.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"Expected {name!r} to be a dense tensor, got {tensor.layout}. Call to_dense() on it first.")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"Expected {name!r} of one of the types {known}, got {tensor.dtype}. Convert it first.")
    values = tensor.contiguous().resolve_conj().resolve_neg()
    if half and values.dtype == torch.float32 and storage_of(values) == RAW:
        rounded = values.half().float()
        values = rounded if torch.allclose(rounded, values, rtol=1e-3, atol=0) else values
    return PackedTensor(name, values.dtype, tuple(values.shape), values)


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the tensor, or zeros of as many bytes if the format cannot store the tensor."""
    if tensor.layout == torch.strided and tensor.dtype in DTYPES:
        return tensor
    return torch.zeros(tensor.numel() * tensor.element_size(), dtype=torch.uint8)


def attributes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields the paths and values of the integer attributes that do not follow from the shapes of tensors."""
    for path, module in model.named_modules():
        name = kept_number(module)
        value = int(getattr(module, name)) if name else 1
        if value > 1 or name not in ("", "groups"):  # 1 is the default number of groups
            yield name_of(path, name), value
        for other in module.__dict__.get(SIZES, ()):
            if other != name:
                yield name_of(path, other), int(getattr(module, other))
    yield from point_numbers(model)


def kept_number(module: nn.Module) -> str:
    """Returns the name of a module's integer attribute that does not follow from shapes; empty if there is none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "groups"
    if isinstance(module, nn.GroupNorm):
        return "num_groups"
    return "num_features" if is_bare_norm(module) else ""


def is_half(floats: torch.dtype) -> bool:
    """Returns whether ``floats``, the dtype for values that are not coded, is float16.

    Raises:
        ValueError: If the dtype is neither float16 nor float32.
    """
    if floats not in (torch.float32, torch.float16):
        raise ValueError(f"Expected floats to be torch.float32 or torch.float16, got {floats!r}.")
    return floats == torch.float16
