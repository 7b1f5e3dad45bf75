"""The export to ONNX files, whose integer weights dequantize to the same values as in torch."""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_selfcompress.activations.layers import activated_modules, quantizing_through, remove_activations
from lightning_selfcompress.channels.dispatch import unfused
from lightning_selfcompress.files.atomic_write import write_beside
from lightning_selfcompress.files.export import check_values
from lightning_selfcompress.files.finalize import finalize
from lightning_selfcompress.files.fold_batchnorm import NOT_FOLDED, fold_norms
from lightning_selfcompress.onnx.activations import Quantizers, quantize_biases
from lightning_selfcompress.onnx.batch_size import fixed_inputs, gives, grown_inputs, is_for, name_batch
from lightning_selfcompress.onnx.constants import fold_constants
from lightning_selfcompress.onnx.fastest import forms_of, write_fastest
from lightning_selfcompress.onnx.nodes import add_zero_points, drop_defaults, flatten_matrices, multiply_out
from lightning_selfcompress.onnx.report import OnnxReport
from lightning_selfcompress.onnx.weights import WIDE_OPSET, CodedWeights, coded_weights, read_codes, store_narrow
from lightning_selfcompress.onnx.widths import round_channels
from lightning_selfcompress.quantize.layers import reading_through
from lightning_selfcompress.tensors import tensors_in

WEIGHTS = ("dequantize", "multiply", "float")


OLDEST_OPSET = 18  # the oldest opset that torch's exporter writes


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *inputs: Any,
    opset: int = WIDE_OPSET,
    fold: bool = True,
    weights: str = "dequantize",
    dynamic_batch: bool = True,
    round_to: int = 1,
    codes: str | os.PathLike[str] | None = None,
    activations: bool | None = None,
    fastest: bool = False,
) -> OnnxReport:
    """Writes a network to an ONNX file whose weights are the integer codes.

    Each weight is an initializer of the narrowest of int4, int8 and int16 that holds all its codes, with one float32
    scale for each output channel. The product of code and scale equals the weight in torch to the bit. With ``fold``,
    the scales include batch normalization, which changes weights by rounding, and constants replace branches whose
    output is constant because a layer has lost its last channel.

    torch's exporter switches settings of the whole process while it runs: no other thread may train meanwhile.

    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> from lightning_selfcompress import convert, to_onnx
    >>> net = convert(torch.nn.Linear(8, 6)).model
    >>> with TemporaryDirectory() as folder:
    ...     report = to_onnx(net, f"{folder}/net.onnx", torch.randn(3, 8))
    >>> report.types
    {'weight': 'int8'}

    Args:
        model: A converted module, with or without removals. Any other module is written with its float weights. The
            module is not changed.
        path: The file. It is written under a temporary name and renamed, so that no partial file ever appears.
        inputs: Example arguments of the module's ``forward``, with which the module is traced.
        opset: Version of ONNX's operators, at least 18. Below 21 there is no int4, and codes wider than int8 stay
            float.
        fold: Whether batch normalization is folded into the layers before it, see :func:`fold_batchnorm`, and constants
            replace the nodes that compute them.
        weights: How codes become weights. ``"dequantize"`` uses the standard DequantizeLinear, which tools recognize as
            quantized weights, and which ONNX Runtime computes at every call unless the session option
            ``session.disable_quant_qdq`` is 1. ``"multiply"`` uses a cast and a product, which runtimes compute once
            when they open the file (ONNX Runtime has the cast of int4 since 1.23). ``"float"`` writes weights in float.
        dynamic_batch: Whether dimension 0 of the inputs may have any size, unless the network's code depends on it.
        round_to: The number to whose multiples a runtime rounds up the output channels of convolutions, by weights of
            zero, when it opens the file. ONNX Runtime is fastest with 16 on processors with AVX-512, with 8 on others.
        codes: The packed file from which :func:`load` has filled ``model``. The codes are read from this file, because
            a plain network has none.
        activations: Whether activations are integers too, which a network trained with
            ``SelfCompression(activations=8)`` or calibrated by :func:`calibrate_activations` has. None takes the
            network as it is, if ``weights`` is ``"dequantize"``. Codes of weights are then int8, as integer kernels
            take them. With False they stay float, and outputs differ by what rounding of activations made of them.
        fastest: Whether to write all forms that the file can have, time them on the example in ONNX Runtime, and keep
            the fastest; ``weights`` and ``activations`` are chosen so, and the report tells the times. On processors
            without instructions for int8, integers lose.

    Returns:
        The file's size, the type of each weight, and notes on the limitations of the file, which a warning repeats.

    Raises:
        ModuleNotFoundError: If onnx, onnxscript or, with ``fastest``, onnxruntime is missing.
        RuntimeError: If torch is older than 2.8, or its exporter cannot export the network.
        ValueError: If values are not finite or do not exist; if ``weights``, ``opset`` or ``round_to`` is out of its
            range; if the module has no ``forward`` or does not take these inputs; if ``codes`` is a file of another
            network.
        PackedFileError: If ``codes`` is damaged.
        OSError: If the path cannot be written.
    """
    onnx = _import_onnx()
    _check_options(onnx.defs.onnx_opset_version(), opset=opset, weights=weights, round_to=round_to)
    if fastest:
        same = {"opset": opset, "fold": fold, "dynamic_batch": dynamic_batch, "round_to": round_to, "codes": codes}
        return _fastest(model, path, inputs, same)
    integer = _are_integers(model, activations, weights)
    check_values(model)
    plain = finalize(model).cpu().eval()
    plain = plain if integer else remove_activations(plain)
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), inputs)
    buffers = [(module, dict(module._buffers), copy.deepcopy(module._buffers)) for module in plain.modules()]
    outputs = _outputs(plain, inputs)
    stored, notes = _stored_weights(model, plain, codes, opset=opset, as_float=weights == "float", integer=integer)
    if fold:
        _, left = fold_norms(plain, *inputs)
        notes += [f"Batch normalization {', '.join(left)} stays: {NOT_FOLDED}."] if left else []
    grown = grown_inputs(plain, inputs) if dynamic_batch else None
    _put_back(buffers)
    stored.put_into(plain)
    proto = _graph(plain, stored, inputs, grown, outputs, opset=opset)
    if dynamic_batch and (fixed := fixed_inputs(proto)):
        notes.append(
            f"Dimension 0 of {', '.join(fixed)} is fixed at the size traced: the network's code depends on it."
        )
    _rewrite(proto, stored, fold=fold, multiply=weights == "multiply", round_to=round_to)
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString(deterministic=True)
    write_beside(path, lambda part: part.write_bytes(data))
    if notes:
        warnings.warn("\n".join(notes), stacklevel=2)
    return OnnxReport(len(data), stored.types, tuple(notes))


def _check_options(newest_opset: int, *, opset: int, weights: str, round_to: int) -> None:
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"Expected round_to >= 1 (channels, a whole number), got {round_to!r}.")
    if not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest_opset:
        raise ValueError(f"Expected opset from {OLDEST_OPSET} to {newest_opset}, got {opset!r}.")
    if weights not in WEIGHTS:
        raise ValueError(f"Expected weights to be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}.")


def _fastest(
    model: nn.Module, path: str | os.PathLike[str], inputs: tuple[Any, ...], same: Mapping[str, Any]
) -> OnnxReport:
    def write(to: str | os.PathLike[str], **form: Any) -> OnnxReport:
        return to_onnx(model, to, *inputs, **same, **form)

    return write_fastest(write, path, tensors_in(inputs), forms_of(integer=any(activated_modules(model))))


def _are_integers(model: nn.Module, activations: bool | None, weights: str) -> bool:
    """Returns whether activations are written as integers, or raises a ValueError where they cannot be."""
    are = any(activated_modules(model))
    if activations and not are:
        raise ValueError(
            f"Expected a network that quantizes its activations, got a {type(model).__name__} that does not. Train it "
            f"with SelfCompression(activations=8), or call calibrate_activations on it."
        )
    if activations and weights != "dequantize":
        raise ValueError(f"Expected weights='dequantize' with activations=True, for integer kernels, got {weights!r}.")
    return are and weights == "dequantize" and activations is not False


def _stored_weights(
    model: nn.Module,
    plain: nn.Module,
    codes: str | os.PathLike[str] | None,
    *,
    opset: int,
    as_float: bool,
    integer: bool,
) -> tuple[CodedWeights, list[str]]:
    """Returns the weights that are written as codes, and notes on the weights that are not."""
    packed, notes = coded_weights(model, plain, codes)
    stored = CodedWeights.of(plain, packed, opset=opset, as_float=as_float, integer=integer)
    notes += stored.notes
    if not packed:
        notes.append(f"Nothing in this {type(model).__name__} is compressed: all its values are written as they are.")
        if codes is None and not as_float:
            notes.append("If load() has filled it, codes= names the packed file.")
    return stored, notes


def _put_back(buffers: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> None:
    """Restores buffers that calls of the network may have changed.

    Args:
        buffers: For each module: the module, its buffers by name, and copies of these buffers.
    """
    for module, own, values in buffers:
        for name in own.keys() & module._buffers.keys():
            if own[name] is not None and not torch.equal(own[name], values[name]):
                own[name].copy_(values[name])
            module._buffers[name] = own[name]


def _import_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Expected the packages onnx and onnxscript, {error.name} is missing. "
            "Install them with pip install onnx onnxscript.",
            name=error.name,
        ) from error
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(f"Expected torch 2.8 or newer for ONNX files, got {torch.__version__}. Update torch.")
    return onnx


def _outputs(plain: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Returns the tensors that a network computes from its inputs, or raises a ValueError if it does not take them."""
    name = type(plain).__name__
    try:
        with torch.no_grad():
            return tensors_in(plain(*inputs))
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a {name} with a forward(), which is what a file is made of. Define it, or write one of its "
            f"modules."
        ) from error
    except Exception as error:
        given = ", ".join(str(tuple(t.shape)) for t in tensors_in(inputs))
        raise ValueError(
            f"Expected inputs that {name}.forward() takes, got {given or 'no tensors'}: {type(error).__name__}: "
            f"{error}. Give an example of each of its arguments."
        ) from error


def _graph(
    plain: nn.Module,
    stored: CodedWeights,
    inputs: tuple[Any, ...],
    grown: tuple[Any, ...] | None,
    outputs: list[Tensor],
    *,
    opset: int,
) -> Any:
    """Returns the exporter's graph: for any batch size if there are longer inputs and that graph passes the checks."""
    if grown is not None:
        with suppress(Exception):  # an error of the network itself occurs again at the fixed size
            proto = _traced(plain, stored, grown, opset=opset, dynamic_batch=True)
            own = tensors_in(inputs)
            fits = is_for(proto, tensors_in(grown), own, outputs)
            if fits and gives(proto, own, outputs, integer=stored.integer):
                return proto
    return _traced(plain, stored, inputs, opset=opset, dynamic_batch=False)


def _traced(plain: nn.Module, stored: CodedWeights, inputs: tuple[Any, ...], *, opset: int, dynamic_batch: bool) -> Any:
    shapes = None
    if dynamic_batch:
        any_size = {0: torch.export.Dim.AUTO}
        shapes = pytree.tree_map(lambda t: any_size if isinstance(t, Tensor) and t.dim() else None, inputs)
    if inputs and isinstance(inputs[-1], dict):
        inputs = (*inputs, {})  # torch takes a dictionary at the end as keyword arguments
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _quiet(), reading_through(read_codes), quantizing_through(Quantizers(plain)), torch.no_grad():
        try:
            program = torch.onnx.export(
                plain, inputs, opset_version=opset, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        except Exception as error:
            if not stored.places:
                raise
            raise RuntimeError(
                f"torch's exporter cannot trace this {type(plain).__name__}. Where integer weights are what it cannot "
                f"trace, as in torch.cond, weights='float' helps; otherwise change what it says: {error}"
            ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    proto = program.model_proto
    proto.graph.ClearField("value_info")
    name_batch(proto)
    return proto


def _rewrite(proto: Any, stored: CodedWeights, *, fold: bool, multiply: bool, round_to: int) -> None:
    """Rewrites the exporter's graph in place, and notes which weights the graph does not use."""
    traced = _initializers(proto)
    if fold:
        fold_constants(proto)
    stored.note_gone(traced, _initializers(proto))
    store_narrow(proto, stored.bits)
    if round_to > 1:
        round_channels(proto, round_to)
    flatten_matrices(proto, stored.bits)
    (multiply_out if multiply else add_zero_points)(proto, stored.bits)
    if stored.integer:
        quantize_biases(proto)
    drop_defaults(proto)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's messages about torchvision, pytree and others, because the user cannot act on them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), unfused():  # the fused operator of transformer layers does not exist in ONNX
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _initializers(proto: Any) -> set[str]:
    return {t.name for t in proto.graph.initializer}
