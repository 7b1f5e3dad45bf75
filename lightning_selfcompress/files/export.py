"""The export of models to packed files, which are written completely or not at all."""

import os
import warnings

import torch
from torch import nn

from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.packing import Packed, is_half, to_bytes
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.report import float_nbytes_of
from lightning_selfcompress.tensors import name_of, own_tensors, whole


class ExportReport(int):
    """The number of bytes of a packed file. ``print`` shows a summary of the file.

    Attributes:
        path: The file.
        float_nbytes: Bytes of the same network in float, before any compression.
        coded: Names of the weights that are stored as codes.
        uncoded: Names of the parameters and buffers that are stored without codes.
    """

    path: str
    float_nbytes: int
    coded: tuple[str, ...]
    uncoded: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the file."""
        return int(self)

    def __str__(self) -> str:
        share = f", {self.nbytes / self.float_nbytes:.1%} of the float network's" if self.float_nbytes else ""
        return (
            f"{self.path}: {self.nbytes:,} bytes{share} ({len(self.coded)} weights as codes, {len(self.uncoded)} "
            f"tensors as they are)"
        )


def export(model: nn.Module, path: str | os.PathLike[str], *, floats: torch.dtype = torch.float32) -> ExportReport:
    """Writes a model to a packed file of the size that :func:`size_report` reports.

    >>> from tempfile import TemporaryDirectory
    >>> from torch import nn
    >>> from lightning_selfcompress import convert, export, size_report
    >>> net = convert(nn.Linear(100, 50), initial_bits=4).model
    >>> with TemporaryDirectory() as folder:
    ...     report = export(net, f"{folder}/net.scnn")
    >>> report.nbytes == size_report(net).nbytes
    True

    Args:
        model: Any module. Tensors that are not quantized are stored unchanged.
        path: The file. It is written under a temporary name and renamed, so that no partial file ever appears.
        floats: The dtype for float32 tensors that are not quantized, such as biases and normalization.
            ``torch.float16`` rounds each such tensor, unless rounding would change a value by more than a thousandth.

    Returns:
        The number of bytes of the file; ``print`` shows a summary.

    Raises:
        ValueError: If tensors are not finite or have no values yet (lazy layers, the meta device), if codes or
            exponents are out of the range of the format, if the format cannot store a tensor (its dtype or its layout),
            or if ``floats`` is neither ``torch.float32`` nor ``torch.float16``.
        OSError: If the path cannot be written.
    """
    half = is_half(floats)
    check_values(model)
    _tell_extra_state(model)
    packed = Packed.of(model, half=half)
    _check_equal(model, packed)
    if not packed.coded:
        warnings.warn(
            f"Nothing in this {type(model).__name__} is compressed: all its values are stored as they are. Train it "
            f"with SelfCompression first.",
            stacklevel=2,
        )
    data = to_bytes(packed)
    write_beside(path, lambda part: part.write_bytes(data))
    report = ExportReport(len(data))
    report.path, report.float_nbytes = os.fspath(path), float_nbytes_of(model)
    report.coded = tuple(t.name for t in packed.coded)
    report.uncoded = tuple(t.name for t in packed.tensors if t.codes is None)
    return report


def check_there(model: nn.Module) -> None:
    """Checks that all tensors of a model have values.

    Raises:
        ValueError: If there are lazy layers, or tensors on the meta device.
    """
    for path, module in model.named_modules():
        for own, tensor in own_tensors(module):
            reason = "of a lazy layer" if nn.parameter.is_lazy(tensor) else "on the meta device" * tensor.is_meta
            if reason:
                name = name_of(path, own)
                raise ValueError(f"Expected values in {name!r}, which is {reason}. Run or load the network first.")


def check_values(model: nn.Module) -> None:
    """Checks that all values to be stored exist and are finite; buffers may hold infinities, as masks do, but not NaN.

    Raises:
        ValueError: If a value does not exist or is not finite.
    """
    check_there(model)
    for path, module in model.named_modules():
        for own, tensor in own_tensors(module):
            if own in module._non_persistent_buffers_set:
                continue
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                continue
            lost = tensor.isnan() if own in module._buffers else ~tensor.isfinite()
            if bool(lost.any()):
                raise ValueError(
                    f"Expected finite values, got NaN or infinity in {name_of(path, own)!r}. Export a checkpoint from "
                    f"before that."
                )


def _tell_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            warnings.warn(
                f"The extra state of {path or 'the network'!r} is not stored: packed files hold tensors alone. "
                f"Keep it in buffers.",
                stacklevel=3,
            )


def _check_equal(model: nn.Module, packed: Packed) -> None:
    """Checks that the weights to be written are the weights that the model computes with."""
    written = {t.name: t for t in packed.coded}
    for p in quantized_parameters(model):
        weight = whole(getattr(p.layer, p.weight_name).detach()).cpu()
        if weight.numel() and not torch.equal(written[p.name].tensor(), weight):
            raise ValueError(
                f"Expected codes of {p.name!r} below 2^31 and exponents from -128 to 127, got others. Its steps are "
                f"far too small or too large; export an earlier checkpoint."
            )
