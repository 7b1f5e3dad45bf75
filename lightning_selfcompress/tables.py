"""Plain text for terminals: tables and histograms that fit their width."""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

GAP = "  "  # between columns


NARROWEST = 12  # characters that are left of a name, at least


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    total: Sequence[str] | None = None,
    *,
    left: int = 1,
    width: int | None = None,
) -> str:
    """Lines of equal columns: head, rule, rows, and below another rule the total.

    Args:
        head: Names of the columns.
        rows: A text for each column.
        total: A last row.
        left: How many columns are flush left; the others are flush right.
        width: Characters of a line, if they are limited: the longest texts that are flush left are then shortened in
            their middle.

    Returns:
        The table, without a line's end at its end.
    """
    lines = [[printable(text) for text in line] for line in (head, *rows, *([total] if total is not None else []))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gaps = len(GAP) * (len(widths) - 1)
    while width is not None and sum(widths) + gaps > width and max(widths[:left]) > NARROWEST:
        widths[widths.index(max(widths[:left]))] -= 1
    texts = []
    for line in lines:
        cells = list(zip(line, widths, strict=True))
        first = [shorten(text, length).ljust(length) for text, length in cells[:left]]
        texts.append(GAP.join([*first, *(text.rjust(length) for text, length in cells[left:])]))
    rule = "-" * (sum(widths) + gaps)
    texts.insert(1, rule)
    if total is not None:
        texts.insert(-1, rule)
    return "\n".join(texts)


def printable(text: str) -> str:
    """A text without what would command a terminal: names in a file may hold anything."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, length: int) -> str:
    """A text of at most so many characters: without its middle where it is longer."""
    if len(text) <= length:
        return text
    first = (length - 2) // 2
    return f"{text[:first]}..{text[len(text) - (length - first - 2) :]}"


def histogram(counts: Mapping[int, int], *, width: int) -> str:
    """A line for each number from the smallest to the largest: the number, how often it occurs, and a bar.

    Args:
        counts: How often each number occurs.
        width: Characters of a line.

    Returns:
        The lines; the longest bar ends at the width.
    """
    if not counts:
        return ""
    numbers = range(min(counts), max(counts) + 1)
    first, second = len(str(numbers[-1])), len(f"{max(counts.values()):,}")
    labels = [f"{n:>{first}}  {counts.get(n, 0):>{second},}  " for n in numbers]
    room = max(1, width - len(labels[0]))
    most = max(counts.values())
    bars = ["#" * -(-counts.get(n, 0) * min(room, most) // most) for n in numbers]
    return "\n".join((label + bar).rstrip() for label, bar in zip(labels, bars, strict=True))


def line_width() -> int | None:
    """Characters of a line of the terminal, or as ``COLUMNS`` says; None where the output goes elsewhere."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None
