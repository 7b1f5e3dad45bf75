"""What the checkpoint of a run adds to its record: the layers at its end, by themselves or with the network's class."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_selfcompress.cli.contents import Contents, LayerRow, read_contents
from lightning_selfcompress.errors import CheckpointError
from lightning_selfcompress.quantize.conversion_plan import plan_conversion
from lightning_selfcompress.reporting.history import (
    FLOAT_NBYTES,
    FloatLayer,
    LayerChange,
    RunHistory,
    sizes_of,
)
from lightning_selfcompress.size.operations import counting_uses, note_uses
from lightning_selfcompress.size.report import size_report


def with_checkpoint(history: RunHistory, checkpoint: Path, *, trusted: bool = False) -> RunHistory:
    """Adds the layers of a checkpoint to the record of a run, as far as they are known without the network's class.

    Args:
        history: The record.
        checkpoint: A checkpoint of the run.
        trusted: Whether any Python object in the checkpoint may be unpickled, which runs code that the file holds.

    Returns:
        The record with the layers; with a note instead, if the checkpoint cannot be read.
    """
    try:
        contents = read_contents(checkpoint, trusted=trusted)
    except CheckpointError as error:
        return replace(history, notes=(*dict.fromkeys((*history.notes, f"The layers are left out: {error}")),))
    known = {name: len(bits) for frame in history.frames for name, bits in frame.bits.items()}
    layers = tuple(_layer(row, history.before, known) for row in contents.layers)
    told = f"The layers are those of {checkpoint.name}, step {contents.facts['global_step']}."
    if not history.before:
        told += " How large they were before, --model of selfcompress report tells, or CompressionReport in the fit."
    parts = _other_nbytes(contents)
    return replace(history, layers=layers, other_nbytes=parts, layers_of=told)


def with_model(history: RunHistory, checkpoint: Path, model: nn.Module) -> RunHistory:
    """Adds the layers of a network to the record of its run, and what it leaves in float.

    Args:
        history: The record.
        checkpoint: The checkpoint from which the network was opened.
        model: The network. Where its ``example_input_array`` is a tensor, multiply-accumulates are counted with it.
    """
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Tensor):
        with torch.no_grad(), counting_uses(model.eval()) as uses:
            model(example)
        note_uses(model, uses, len(example))
    reasons = history.left_in_float or plan_conversion(model).left_in_float
    told = f"The layers are those of {checkpoint.name}."
    sizes = sizes_of(size_report(model))
    return replace(history, left_in_float=reasons, layers_of=told, **sizes)


def _layer(row: LayerRow, before: Mapping[str, FloatLayer], known: Mapping[str, int]) -> LayerChange:
    """Returns a layer of a file beside what is known of it before compression."""
    names = (f"{row.name}.weight", row.name)  # recurrent layers have weights of other names
    layer = next((before[name] for name in names if name in before), None)
    channels = layer.channels if layer else next((known[name] for name in names if name in known), None)
    alive = row.channels / row.channels_stored if row.channels is not None and row.channels_stored else None
    weights = round(row.weights * alive) if alive is not None else None
    macs = layer.macs if layer and layer.macs else None
    share = row.weights / layer.weights if layer else 1.0  # of the original weights that the file still has
    return LayerChange(
        name=row.name,
        channels_before=channels,
        channels=row.channels,
        weights_before=layer.weights if layer else None,
        weights=weights,
        bits=row.learned_bits * share if row.learned_bits is not None else None,
        nbytes_before=FLOAT_NBYTES * layer.weights if layer else None,
        nbytes=row.nbytes,
        macs_before=macs,
        macs=round(macs * weights / layer.weights) if macs and layer and weights is not None else None,
    )


def _other_nbytes(contents: Contents) -> dict[str, int]:
    return {
        "everything left in float": sum(row.nbytes for row in contents.plain),
        "names and shapes": contents.size.structure_nbytes,
    }
