"""The contents and differences of files, as text for people and as plain values for machines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from textwrap import fill
from typing import Any

from lightning_selfcompress.cli.contents import Contents, LayerRow, PlainRow
from lightning_selfcompress.cli.differences import Difference, Side
from lightning_selfcompress.size.report import NOTHING
from lightning_selfcompress.tables import histogram, printable, table

DEFAULT_WIDTH = 80


_LAYER_HEAD = ("layer", "shape", "channels", "of", "weights", "whole bits", "max whole", "learned bits", "bytes")


_PLAIN_HEAD = ("as it is", "tensors", "stored as", "values", "bytes")


_DIFFERENCE_HEAD = ("tensor", "shape A", "shape B", "bits A", "bits B", "bytes A", "bytes B", "largest difference")


def contents_text(contents: Contents, *, width: int | None) -> str:
    """Formats a file as text: its kind, its layers, its unchanged tensors, and a histogram of the bits of its codes.

    Args:
        contents: The contents of the file.
        width: Characters per line; None does not shorten names.
    """
    parts = [_wrapped(_head(contents), width)]
    if contents.layers:
        rows = [_LAYER_HEAD, *map(_layer_row, contents.layers), _layer_total(contents.layers)]
        if contents.kind == "packed":  # a packed file does not hold the learned bits
            rows = [(*row[:-2], row[-1]) for row in rows]
        parts.append(table(rows[0], rows[1:-1], rows[-1], width=width))
        parts.append(_wrapped(_notes(contents), width))
    else:
        parts.append(NOTHING)
    if contents.plain:
        parts.append(table(_PLAIN_HEAD, _plain_rows(contents.plain), left=3, width=width))
    if contents.histogram:
        bars = histogram(contents.histogram, width=width or DEFAULT_WIDTH)
        parts.append(f"bits a code needs, and in how many channels\n{bars}")
    return "\n\n".join(part for part in parts if part)


def contents_values(contents: Contents) -> dict[str, Any]:
    """Returns the contents of a file as plain values with stable keys.

    Args:
        contents: The contents of the file.
    """
    return {
        "file": contents.path,
        "kind": contents.kind,
        "nbytes": contents.nbytes,
        "packed_nbytes": contents.size.nbytes,
        "head": dict(contents.facts),
        "layers": [asdict(row) for row in contents.layers],
        "uncompressed": [asdict(row) for row in contents.plain],
        "histogram": {str(bits): contents.histogram[bits] for bits in sorted(contents.histogram)},
    }


def differences_text(a: Contents, b: Contents, found: Sequence[Difference], *, width: int | None) -> str:
    """Formats the comparison of two files as text: the differences, or that both hold the same network.

    Args:
        a: The first file.
        b: The second file.
        found: The differences between the files.
        width: Characters per line; None does not shorten names.
    """
    files = (("A", a), ("B", b))
    lines = [f"{letter}: {c.path}, {_bytes_of(c)}" for letter, c in files]
    lines += [f"{letter}: {note}" for letter, c in files for note in _notes(c)]
    head = _wrapped(lines, width)
    if not found:
        return f"{head}\nThe same network in both."
    rows = table(_DIFFERENCE_HEAD, map(_difference_row, found), width=width)
    return f"{head}\n\n{rows}\n\n{len(found)} {'tensors differ' if len(found) > 1 else 'tensor differs'}."


def differences_values(a: Contents, b: Contents, found: Sequence[Difference]) -> dict[str, Any]:
    """Returns the comparison of two files as plain values with stable keys.

    Args:
        a: The first file.
        b: The second file.
        found: The differences between the files.
    """
    files = {
        key: {"file": c.path, "kind": c.kind, "nbytes": c.nbytes, "packed_nbytes": c.size.nbytes}
        for key, c in (("a", a), ("b", b))
    }
    return files | {"equal": not found, "differences": [_without_infinity(asdict(d)) for d in found]}


def _wrapped(lines: Iterable[str], width: int | None) -> str:
    return "\n".join(
        line if width is None else fill(line, max(width, 20), break_long_words=False, break_on_hyphens=False)
        for line in map(printable, lines)
    )


def _head(contents: Contents) -> list[str]:
    facts, size = contents.facts, contents.size
    if contents.kind == "packed":
        what = f"packed file, version {facts['format_version']}, {contents.nbytes:,} bytes"
    else:
        what = (
            f"checkpoint of Lightning {facts['lightning_version']}, epoch {facts['epoch']}, step "
            f"{facts['global_step']}, {contents.nbytes:,} bytes; {_bytes_of(contents)}"
        )
    codes, floats = size.code_nbytes + size.channel_nbytes, sum(size.values.values())
    account = (
        f"codes and scales {codes:,} + as it is {floats:,} + names and shapes {size.structure_nbytes:,} = "
        f"{size.nbytes:,} bytes"
    )
    return [f"{contents.path}: {what}", account]


def _bytes_of(contents: Contents) -> str:
    if contents.kind == "packed":
        return f"{contents.nbytes:,} bytes"
    return f"{'' if contents.whole_network else 'about '}{contents.size.nbytes:,} bytes as a packed file"


def _notes(contents: Contents) -> list[str]:
    """Returns each note once, with the names of its layers."""
    layers: dict[str, list[str]] = {}
    for row in contents.layers:
        layers.setdefault(row.note, []).append(row.name)
    return [f"{note}: {', '.join(names)}" for note, names in layers.items() if note]


def _layer_row(row: LayerRow) -> tuple[str, ...]:
    return (
        row.name,
        _shape(row.shape),
        *(_number(n) for n in (row.channels, row.channels_stored, row.weights)),
        _number(row.bits, ".2f"),
        _number(row.max_bits),
        _number(row.learned_bits, ".2f"),
        f"{row.nbytes:,}",
    )


def _layer_total(rows: Sequence[LayerRow]) -> tuple[str, ...]:
    weights = sum(row.weights for row in rows)

    def mean(column: str) -> float | None:
        values = [(getattr(row, column), row.weights) for row in rows]
        known = [(value, n) for value, n in values if value is not None]
        return sum(v * n for v, n in known) / max(sum(n for _, n in known), 1) if known else None

    total = LayerRow(
        "total",
        (),
        sum(row.channels or 0 for row in rows),
        sum(row.channels_stored or 0 for row in rows),
        weights,
        mean("learned_bits"),
        mean("bits"),
        max((row.max_bits or 0 for row in rows), default=0),
        sum(row.nbytes for row in rows),
    )
    name, _, *numbers = _layer_row(total)
    return (name, "", *numbers)


def _plain_rows(rows: Sequence[PlainRow]) -> list[tuple[str, ...]]:
    """Returns a row for each module and each dtype in which its tensors are stored."""
    together: dict[tuple[str, str], list[PlainRow]] = {}
    for row in rows:
        together.setdefault((row.name.rpartition(".")[0], row.stored_as), []).append(row)
    return [
        (
            module,
            ", ".join(row.name.rpartition(".")[2] for row in group),
            stored_as,
            f"{sum(_numel(row.shape) for row in group):,}",
            f"{sum(row.nbytes for row in group):,}",
        )
        for (module, stored_as), group in together.items()
    ]


def _difference_row(difference: Difference) -> tuple[str, ...]:
    a, b = difference.a, difference.b

    def texts(side: Side | None) -> tuple[str, str, str]:
        if side is None:
            return "absent", "", ""
        return _shape(side.shape), side.stored_as if side.bits is None else f"{side.bits:.2f}", f"{side.nbytes:,}"

    pairs = (text for both in zip(texts(a), texts(b), strict=True) for text in both)
    return (difference.name, *pairs, "" if difference.largest is None else f"{difference.largest:.3g}")


def _without_infinity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces an infinite or NaN ``largest`` by None, because JSON has neither."""
    largest = values["largest"]
    return {**values, "largest": largest if largest is None or isfinite(largest) else None}


def _number(value: float | None, form: str = ",") -> str:
    return "?" if value is None else format(value, form)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
