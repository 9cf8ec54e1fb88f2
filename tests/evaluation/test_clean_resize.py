"""The antialiased resizing of clean-fid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.evaluation.inception import clean_resize


@pytest.mark.parametrize("size", [5, 7, 24])
def test_each_channel_is_resized_by_pillow_without_rounding(size, generator):
    pixels = torch.randint(0, 256, (2, 3, 11, 9), generator=generator).to(torch.uint8)
    found = clean_resize(pixels, size)
    assert found.shape == (2, 3, size, size)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 255
    plane = Image.fromarray(pixels[1, 2].float().numpy()).resize((size, size), Image.BICUBIC)
    np.testing.assert_array_equal(found[1, 2], np.asarray(plane).clip(0, 255))
    assert bool((found != found.round()).any())


def test_no_pixel_is_left_out_where_an_image_shrinks():
    """A checkerboard becomes grey; without antialiasing it stays black and white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = clean_resize(board.to(torch.uint8).expand(1, 3, 64, 64), 8)
    assert float((small - 127.5).abs().max()) < 3
