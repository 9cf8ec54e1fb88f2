"""What images are known by: it estimates how far two sets are apart, whatever their type."""

from __future__ import annotations

import pytest
import torch

from fastdiff import data
from fastdiff.data.datasets import ImageSet
from fastdiff.data.image_grid import from_uint8
from fastdiff.training.fingerprint import CHUNK, SUMS, fingerprint


def gap(a, b):
    """Root mean square of the difference of two fingerprints."""
    ours, theirs = (torch.tensor(fingerprint(ImageSet(x))["sums"]) for x in (a, b))
    return (ours - theirs).square().mean().sqrt().item()


@pytest.fixture
def pixels(generator):
    return torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_it_is_of_the_images_and_not_of_their_type(pixels):
    assert gap(pixels, from_uint8(pixels)) < 1e-4
    assert gap(pixels, pixels.to(memory_format=torch.channels_last)) < 1e-9
    assert len(fingerprint(ImageSet(pixels))["sums"]) == SUMS


def test_it_estimates_the_difference(pixels, generator):
    """Of noise, of a constant, of one image and of one pixel: within the spread of 16 sums."""
    noise = torch.randint(-3, 4, pixels.shape, generator=generator)
    inside = pixels.clamp(10, 240)
    one_image, one_pixel = inside.clone(), inside.clone()
    one_image[7] = inside[8]
    one_pixel[7, 1, 3, 5] += 10
    for other in ((inside + noise).to(torch.uint8), inside + 5, one_image, one_pixel):
        wanted = (other.float() - inside.float()).square().mean().sqrt().item()
        assert wanted > 0
        assert 0.3 * wanted < gap(inside, other) < 2.5 * wanted


def test_order_and_labels_count(pixels):
    assert gap(pixels, pixels.flip(0)) > 30
    assert gap(pixels, pixels.flip(-1)) > 30
    labels = torch.arange(40) % 2
    two = [fingerprint(ImageSet(pixels, x, ("a", "b")))["labels"] for x in (labels, 1 - labels)]
    assert two[0] != two[1]
    assert fingerprint(ImageSet(pixels))["labels"] is None


def test_images_are_read_in_parts(generator):
    """More values than a part has, and images larger than a part."""
    many = torch.randint(256, (CHUNK // 64 + 3, 1, 8, 8), generator=generator, dtype=torch.uint8)
    changed = many.clone()
    changed[-1] = 255 - changed[-1]
    assert 0.3 < gap(many, changed) / (changed.double() - many).square().mean().sqrt() < 2.5
    large = torch.zeros(2, 1, 1100, 1100, dtype=torch.uint8)
    assert gap(large, large + 1) == pytest.approx(1, rel=0.7)


def test_the_digits_of_today_are_those_of_every_version():
    """A change of the signs would leave every run without its images."""
    sums = fingerprint(data.digits("train", 8))["sums"]
    assert sums[:3] == pytest.approx([35.7793095, -36.9334808, 99.6784283], abs=1e-5)
