"""A picture of the bits of every channel, in which removed channels are gaps."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]  # (height, width, 3)

_WIDTH, _LEFT, _RIGHT = 512, 150, 80  # pixels of a full band, of the names before it and the numbers behind it
_HEIGHT, _GAP = 20, 6  # pixels of a band, and between two
_MOST = 256  # channels in a line: a channel is 3 pixels wide at least
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


def bits_picture(bits: Mapping[str, Tensor]) -> Picture:
    """Draws a band for each weight, a bar for each channel that it was converted with, coloured by its bits.

    A band is as wide whatever the number of its channels, which stay in their places from picture to picture; a weight
    of more than 256 channels takes several lines. On the left is the name, on the right how many channels are left.

    Args:
        bits: For the name of each weight its bit depths, ``(channels,)``; NaN where a channel was removed.

    Returns:
        The picture, ``(height, width, 3)``.
    """
    values = {name: tensor.double().numpy() for name, tensor in bits.items()}
    most = max([8.0, *(math.ceil(np.nanmax(v)) for v in values.values() if not np.isnan(v).all())])
    bands = [_band(v, most) for v in values.values()]
    scale = _scale(most)
    tops = np.cumsum([_GAP, scale.shape[0] + 3 * _GAP, *(b.shape[0] + _GAP for b in bands)])
    picture = np.full((int(tops[-1]), _LEFT + _WIDTH + _RIGHT, 3), _WHITE, np.uint8)
    texts = [(_LEFT + 270, int(tops[0]), "bits"), *((x, int(tops[0]), text) for x, text in _ticks(most))]
    picture[tops[0] : tops[0] + scale.shape[0], _LEFT : _LEFT + scale.shape[1]] = scale
    for (name, v), band, top in zip(values.items(), bands, tops[1:], strict=False):
        picture[top : top + band.shape[0], _LEFT : _LEFT + _WIDTH] = band
        left = int((~np.isnan(v)).sum())
        middle = int(top) + band.shape[0] // 2 - 6
        texts += [
            (8, middle, _fitting(name.removesuffix(".weight"))),
            (_LEFT + _WIDTH + 8, middle, f"{left} of {len(v)}"),
        ]
    return _written(picture, texts)


def _band(values: NDArray[np.float64], most: float) -> Picture:
    """Returns the channels of one weight, ``(lines, _WIDTH, 3)``, with an edge, and thin gaps where there is room."""
    lines = max(1, math.ceil(len(values) / _MOST))
    a_line = max(1, math.ceil(len(values) / lines))
    drawn = []
    for i in range(lines):
        part = values[i * a_line : (i + 1) * a_line]
        part = np.concatenate([part, np.full(a_line - len(part), np.nan)])
        number = np.arange(_WIDTH) * a_line // _WIDTH  # of the channel at each pixel
        line = np.repeat(colours(part[number], most)[None], _HEIGHT if lines == 1 else _HEIGHT // 2, axis=0)
        if _WIDTH // a_line >= 6:
            line[:, np.flatnonzero(np.diff(number)) + 1] = _WHITE
        drawn.append(line)
    band = np.concatenate(drawn)
    band[[0, -1]] = band[:, [0, -1]] = _EDGE
    return band


def _scale(most: float) -> Picture:
    """Returns the colours from 0 to the most bits, and an empty box for what was removed."""
    line = colours(np.linspace(0, most, 256), most)
    scale = np.full((14, 370 + 24, 3), _WHITE, np.uint8)
    scale[:, :256] = line
    box = scale[:, 370:]
    box[[0, -1]] = box[:, [0, -1]] = _EDGE
    return scale


def _ticks(most: float) -> list[tuple[int, str]]:
    """Returns the texts beside the scale, with where they begin."""
    return [(_LEFT - 14, "0"), (_LEFT + 260, f"{most:g}"), (_LEFT + 402, "removed")]


def _fitting(name: str) -> str:
    most = (_LEFT - 16) // 6  # letters are 6 pixels wide
    return name if len(name) <= most else f"{name[: most // 2 - 1]}..{name[-(most - most // 2 - 1) :]}"


def _written(picture: Picture, texts: list[tuple[int, int, str]]) -> Picture:
    """Writes texts into a picture, by Pillow, without which no logger of TensorBoard takes pictures."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for x, y, text in texts:
        draw.text((x, y), text, fill=_INK)
    return np.asarray(image)
