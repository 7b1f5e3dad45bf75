"""The picture of every channel's bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_selfcompress.monitoring.picture import bits_picture, colours

WHITE, EMPTY, FULL = (255, 255, 255), (68, 1, 84), (253, 231, 37)


def bands(picture):
    """The pixels of the middle of each band, one row for each."""
    inner = picture[:, 8:392]
    edges = [y for y in range(len(inner)) if (inner[y] == 190).all()]
    return [inner[(top + bottom) // 2, 1:-1] for top, bottom in zip(edges[::2], edges[1::2], strict=True)]


def test_channels_keep_their_places():
    """A channel is drawn where it was in the first picture, a removed one is white, and bits have their colours."""
    first = {"a.weight": torch.tensor([8.0, 8.0, 0.0, 8.0]), "b.weight": torch.tensor([8.0, 8.0])}
    later = {"a.weight": torch.tensor([torch.nan, 8.0, 0.0, 8.0]), "b.weight": torch.tensor([8.0, torch.nan])}
    pictures = [bits_picture(first), bits_picture(later)]
    assert pictures[0].shape == pictures[1].shape
    for picture, left, right in zip(pictures, (FULL, WHITE), (FULL, WHITE), strict=True):
        a, b = bands(picture)
        assert [tuple(a[x]) for x in (48, 144, 240, 336)] == [left, FULL, EMPTY, FULL]
        assert [tuple(b[x]) for x in (96, 288)] == [FULL, right]


def test_a_layer_of_many_channels_takes_several_lines():
    """No channel is narrower than three pixels, and none is left out."""
    bits = torch.full((700,), torch.nan)
    bits[::7] = 4.0
    picture = bits_picture({"a.weight": bits})
    assert len(picture) > len(bits_picture({"a.weight": bits[:200]}))
    coloured = (picture[40:, 8:392] == colours(np.array([4.0]), 8.0)[0]).all(-1)
    assert coloured.sum() >= 100 * 3 * 8 - 50  # 100 channels of 3 pixels and half a band, without the edges
    assert coloured.any(0).sum() > 300


@given(st.lists(st.floats(0, 40), min_size=1, max_size=9))
def test_colours_are_those_of_the_scale(bits):
    """More bits are never darker, and the scale grows where a depth is above eight bits."""
    values = np.array(sorted(bits))
    brightness = colours(values, most=40.0).astype(int).sum(-1)
    assert (np.diff(brightness) >= -2).all()


@pytest.mark.parametrize(("deepest", "most"), [(2.0, 8.0), (8.7, 8.0), (9.5, 12.0), (24.0, 24.0)])
def test_the_scale_stays(deepest, most):
    """Depths that wander about eight bits change no colours; a scale has room for the deepest channel."""
    (band,) = bands(bits_picture({"a.weight": torch.tensor([deepest])}))
    assert tuple(band[100]) == tuple(colours(np.array([deepest]), most)[0])


def test_nothing_left_or_nothing_there():
    """Networks without a channel, and without a layer, have a picture too."""
    assert bits_picture({"a.weight": torch.full((3,), torch.nan)}).dtype == np.uint8
    assert bits_picture({}).shape[-1] == 3
