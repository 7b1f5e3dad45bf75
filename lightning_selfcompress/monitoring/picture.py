"""A picture of the bits of every channel, in which removed channels are gaps."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]  # (height, width, 3)

_WIDTH, _MARGIN = 384, 8  # pixels of a band, and around it: about as wide as TensorBoard draws a picture
_TEXT, _BAND, _GAP = 16, 16, 8  # pixels of height of a line of text, of a band, and before the next text
_MOST = 128  # channels in a line: a channel is 3 pixels wide at least
_WHITE, _INK, _EDGE = (255, 255, 255), (40, 40, 40), (190, 190, 190)
# from 0 bits to the most; lightness grows evenly, so that eyes that tell no red from green see it too
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def colours(bits: NDArray[np.float64], most: float) -> Picture:
    """Returns the colours of bit depths: dark purple at 0, yellow at the most, and white for NaN.

    >>> colours(np.array([0.0, 8.0, np.nan]), most=8.0).tolist()
    [[68, 1, 84], [253, 231, 37], [255, 255, 255]]

    Args:
        bits: Bit depths, of any shape.
        most: The bit depth of the last colour.

    Returns:
        Red, green and blue, ``(*shape, 3)``.
    """
    places = np.linspace(0, most, len(_COLOURS))
    mixed = np.stack([np.interp(np.nan_to_num(bits), places, channel) for channel in _COLOURS.T], axis=-1)
    return np.where(np.isnan(bits)[..., None], np.array(_WHITE), mixed.round()).astype(np.uint8)


def can_draw() -> bool:
    """Returns whether there is a Pillow that writes letters of a given size, as from 10.1 on; TensorBoard needs one."""
    try:
        from PIL import ImageFont

        ImageFont.load_default(12)
    except (ImportError, TypeError):
        return False
    return True


def bits_picture(bits: Mapping[str, Tensor]) -> Picture:
    """Draws a band for each weight, a bar for each channel that it was converted with, coloured by its bits.

    A band is as wide whatever the number of its channels, which stay in their places from picture to picture; a weight
    of more than 128 channels takes several lines. Above it are its name and how many channels are left.

    Args:
        bits: For the name of each weight its bit depths, ``(channels,)``; NaN where a channel was removed.

    Returns:
        The picture, ``(height, width, 3)``.
    """
    values = {name: tensor.double().numpy() for name, tensor in bits.items()}
    deepest = max((float(np.nanmax(v)) for v in values.values() if not np.isnan(v).all()), default=0.0)
    most = 8.0 if deepest <= 9 else 4.0 * math.ceil(deepest / 4)  # depths that start at 8 wander: colours are to stay
    bands = [_scale(most), *(_band(v, most) for v in values.values())]
    left = [f"{int((~np.isnan(v)).sum()):,} of {len(v):,}" for v in values.values()]
    names = [f"0 to {most:g} bits", *(_fitting(name.removesuffix(".weight")) for name in values)]
    ends = np.cumsum([_MARGIN, *(_TEXT + band.shape[0] + _GAP for band in bands)])
    picture = np.full((int(ends[-1]), _WIDTH + 2 * _MARGIN, 3), _WHITE, np.uint8)
    for top, band in zip(ends, bands, strict=False):
        picture[top + _TEXT : top + _TEXT + band.shape[0], _MARGIN : _MARGIN + _WIDTH] = band
    return _written(picture, list(zip(ends.tolist(), names, ["removed", *left], strict=False)))


def _band(values: NDArray[np.float64], most: float) -> Picture:
    """Returns the channels of one weight, ``(lines, _WIDTH, 3)``, with an edge, and thin gaps where there is room."""
    lines = max(1, math.ceil(len(values) / _MOST))
    a_line = max(1, math.ceil(len(values) / lines))
    drawn = []
    for i in range(lines):
        part = values[i * a_line : (i + 1) * a_line]
        part = np.concatenate([part, np.full(a_line - len(part), np.nan)])
        number = np.arange(_WIDTH) * a_line // _WIDTH  # of the channel at each pixel
        line = np.repeat(colours(part[number], most)[None], _BAND if lines == 1 else _BAND // 2, axis=0)
        if _WIDTH // a_line >= 6:
            line[:, np.flatnonzero(np.diff(number)) + 1] = _WHITE
        drawn.append(line)
    band = np.concatenate(drawn)
    band[[0, -1]] = band[:, [0, -1]] = _EDGE
    return band


def _scale(most: float) -> Picture:
    """Returns the colours from 0 to the most bits, and an empty box for what was removed."""
    line = colours(np.linspace(0, most, _WIDTH * 3 // 4), most)
    scale = np.full((_BAND, _WIDTH, 3), _WHITE, np.uint8)
    scale[:, : len(line)] = line
    box = scale[:, -3 * _BAND :]
    box[[0, -1]] = box[:, [0, -1]] = _EDGE
    return scale


def _fitting(name: str) -> str:
    most = 42  # letters, beside the number of channels
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[-(most - most // 2 - 1) :]}"


def _written(picture: Picture, lines: list[tuple[int, str, str]]) -> Picture:
    """Writes texts into a picture, by Pillow, without which no logger of TensorBoard takes pictures.

    Args:
        picture: The picture.
        lines: The top of each line, the text on its left, and that on its right.
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for top, left, right in lines:
        draw.text((_MARGIN, top), left, fill=_INK, font_size=12)
        draw.text((_MARGIN + _WIDTH, top), right, fill=_INK, font_size=12, anchor="ra")
    return np.asarray(image)
