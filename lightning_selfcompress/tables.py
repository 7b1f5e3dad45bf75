"""Plain-text tables and histograms that fit the width of a terminal."""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape

GAP = "  "  # separates two columns


NARROWEST = 12  # columns are never narrowed below this many characters


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    total: Sequence[str] | None = None,
    *,
    left: int = 1,
    width: int | None = None,
) -> str:
    """Formats a table: the head, a rule, the rows, and the total below another rule.

    Args:
        head: Names of the columns.
        rows: The rows, each with one text per column.
        total: The last row, if there is one.
        left: Number of leading columns that are flush left; the other columns are flush right.
        width: Largest number of characters per line, or None for no limit. To keep to the limit, the widest flush-left
            columns are narrowed, to no fewer than 12 characters, and their texts lose characters in the middle.

    Returns:
        The table, without a newline at its end.
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


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None, *, left: int = 1
) -> str:
    """Formats a table as HTML: the head, the rows, and the total in the foot.

    Args:
        head: Names of the columns.
        rows: The rows, each with one text per column.
        total: The last row, if there is one.
        left: Number of leading columns that are flush left; the other columns are flush right, as numbers are.

    Returns:
        The table. It has a style of its own only in what a page without a style sheet needs to align the columns.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ["left"] * left + ["right"] * (len(cells) - left)
        texts = [escape(printable(text)) for text in cells]
        inner = [f'<{tag} style="text-align:{side}">{text}</{tag}>' for text, side in zip(texts, sides, strict=True)]
        return f"<tr>{''.join(inner)}</tr>"

    foot = f"<tfoot>{row(total, 'td')}</tfoot>" if total is not None else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="table"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody>{foot}</table></div>'


def printable(text: str) -> str:
    """Replaces all unprintable characters of a text, because names in a file may contain terminal escape codes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, length: int) -> str:
    """Shortens a text to at most ``length`` characters by replacing its middle with two dots."""
    if len(text) <= length:
        return text
    first = (length - 2) // 2
    return f"{text[:first]}..{text[len(text) - (length - first - 2) :]}"


def histogram(counts: Mapping[int, int], *, width: int) -> str:
    """Formats one line for each number from the smallest to the largest: the number, its count and a bar.

    Args:
        counts: How often each number occurs.
        width: Number of characters per line.

    Returns:
        The lines. A bar has one character per occurrence if the longest bar then fits; otherwise all bars are scaled so
        that the longest one ends at ``width``.
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
    """Returns the line width that ``COLUMNS`` or the terminal gives, or None if there is neither."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None
