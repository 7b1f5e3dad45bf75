"""A drawing of the parts of a packed file, by matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAYER, _OTHER = "#1f5fa8", "#9aa0a6"  # told apart by lightness too


def draw_parts(
    parts: Sequence[tuple[str, int, str]], title: str, ax: "Axes | None" = None
) -> "tuple[Figure | None, Axes]":
    """Draws a bar for each part of a packed file.

    Args:
        parts: The name of each part, its bytes, and what stands beside its bar; empty where it is no layer.
        title: What stands above the bars.
        ax: Axes to draw on; by default those of a new figure.

    Returns:
        The new figure, or None if axes were given, and the axes.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    figure = None
    if ax is None:
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Expected matplotlib, which draws the plot, found none. Install it with: pip install matplotlib.",
                name="matplotlib",
            ) from error
        figure, ax = pyplot.subplots(figsize=(7, 1.2 + 0.32 * len(parts)), layout="constrained")
    places = range(len(parts))
    colours = [_LAYER if note else _OTHER for _, _, note in parts]
    bars = ax.barh(places, [nbytes for _, nbytes, _ in parts], color=colours, height=0.7)
    texts = [f" {nbytes:,}{f'  ({note})' if note else ''}" for _, nbytes, note in parts]
    ax.bar_label(bars, texts, fontsize="small")
    ax.set_yticks(places, [name for name, _, _ in parts])
    ax.invert_yaxis()  # the first layer on top
    ax.margins(x=0.45)  # room for what stands beside the longest bar
    ax.set_xlim(left=0)
    ax.set_xlabel("bytes in the packed file")
    ax.set_title(title, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
