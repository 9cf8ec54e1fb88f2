"""The feature space of small data: white on its reference, for grey and colour, small and large."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff.data.datasets import digits
from fastdiff.evaluation import PrincipalComponents, principal_components, thumbnails

pytestmark = pytest.mark.usefixtures("one_thread")


def test_features_are_white_on_the_training_digits():
    train = digits("train").images
    features = PrincipalComponents(train)
    seen = features(train)
    assert seen.shape == (len(train), 32)
    assert seen.dtype == np.float64
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(seen.T), np.eye(32), atol=1e-8)
    assert 0.95 < features.explained < 0.99
    assert features(train[:0]).shape == (0, 32)
    with pytest.raises(ValueError, match="more than 32 images, got 32"):
        PrincipalComponents(train[:32])


def colours(count, size, generator):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)


def test_pixels_in_colour_and_floats_have_the_same_features(generator, monkeypatch):
    pixels = colours(60, 6, generator)
    space = PrincipalComponents(pixels)
    monkeypatch.setattr(principal_components, "_ROWS", 7)
    parts = PrincipalComponents(pixels.double() / 127.5 - 1)
    signs = np.sign((space.projection * parts.projection).sum(0))
    np.testing.assert_allclose(space(pixels), parts(pixels) * signs, atol=1e-4)
    np.testing.assert_allclose(np.cov(space(pixels).T), np.eye(32), atol=1e-8)


def test_large_images_are_averaged_first(generator):
    pixels = colours(40, 64, generator)
    small = thumbnails(pixels)
    assert small.shape == (40, 3, 32, 32)
    assert small.dtype == torch.uint8
    means = pixels.double().view(40, 3, 32, 2, 32, 2).mean((3, 5))
    assert float((small.double() - means).abs().max()) <= 0.5
    assert thumbnails(small) is small
    space = PrincipalComponents(pixels)
    np.testing.assert_array_equal(space(pixels), space(small))


def test_images_that_vary_too_little():
    pixels = torch.zeros(50, 1, 8, 8)
    pixels[:, 0, 0, 0] = torch.linspace(-1, 1, 50)
    with pytest.raises(ValueError, match="fewer than 32 directions, got 50 images"):
        PrincipalComponents(pixels)
