"""The size in a Trainer's progress bar, and in one line at the end of a training."""

from typing import Any

from torch import nn

from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.report import SizeReport

_UNITS = "B", "kB", "MB", "GB"


def size_text(nbytes: int, float_nbytes: int) -> str:
    """Returns a size and its share of the float network in a few characters.

    >>> size_text(7463, 186680), size_text(186680, 186680), size_text(12, 100)
    ('7.46 kB (4.0%)', '187 kB (100.0%)', '12 B (12.0%)')

    Args:
        nbytes: Bytes of the packed file.
        float_nbytes: Bytes of the float network.
    """
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:  # which three digits would round to a thousand
        value, unit = value / 1000, unit + 1
    digits = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{digits} {_UNITS[unit]} ({100 * nbytes / max(float_nbytes, 1):.1f}%)"


def show_size(trainer: Any, report: SizeReport) -> None:
    """Adds the size to what the Trainer's progress bar shows, of tqdm, of rich, or of the user's own."""
    trainer.progress_bar_metrics["size"] = size_text(report.nbytes, report.float_nbytes)


def fit_summary(module: nn.Module, report: SizeReport) -> str:
    """Returns what a training has made of a network, in one line.

    Args:
        module: The converted module.
        report: Its sizes.

    Returns:
        ``186,680 -> 7,463 bytes (4.0%), 106 of 294 channels removed, 2.1 bits per weight left``: bytes of the float
        network and of the packed file, output channels that are gone for good, and bits of codes in the packed file for
        each weight that is left.
    """
    total = report.total
    removed = total.channels_before - sum(p.channels for p in quantized_parameters(module))
    bits = 8 * total.code_nbytes / max(total.weights, 1)
    return (
        f"{report.float_nbytes:,} -> {report.nbytes:,} bytes ({100 * report.share_of_float:.1f}%), "
        f"{removed:,} of {total.channels_before:,} channels removed, {bits:.1f} bits per weight left"
    )
