"""Sets of pictures, what is kept of them, and their comparison with a reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastdiff.common.errors import DataError, InputError
from fastdiff.data.datasets import ImageSet, digits
from fastdiff.evaluation import (
    Gaussian,
    Pictures,
    PrincipalComponents,
    Reference,
    compare,
    frechet_distance,
    kernel_distance,
)
from fastdiff.evaluation.pictures import as_pixels, pixel_batches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def real():
    """Training digits with their features, the space, and the held-out digits."""
    train = Pictures.of(pixel_batches(digits("train", 8)), progress=False)
    space = PrincipalComponents(train.thumbnails)
    held_out = Pictures.of(pixel_batches(digits("test", 8)), space, progress=False)
    return train.with_features(space), held_out, space


def test_pictures_of_a_set(real):
    train, held_out, space = real
    images = digits("test", 8)
    assert len(held_out) == len(images)
    assert held_out.thumbnails.dtype == torch.uint8
    whole = as_pixels(images.images)
    assert torch.equal(held_out.thumbnails, whole)
    np.testing.assert_allclose(held_out.features, space(whole), atol=1e-9)
    assert len(train[5:9]) == 4
    np.testing.assert_array_equal(train[5:9].features, train.features[5:9])
    uint8 = ImageSet(whole)
    assert torch.equal(torch.cat(list(pixel_batches(uint8))), whole)


def test_copies_are_found_out_and_held_out_images_are_not(real):
    train, held_out, _ = real
    compared = compare(train[np.arange(0, 1200, 3)], Reference(train), held_out)
    assert compared.images == 400
    assert compared.matched_size == 355
    assert compared.kid_subset_size == 400
    assert compared.figures.nearest_median == compared.matched.nearest_min == 0
    assert compared.figures.precision == 1
    assert compared.real.nearest_min > 0.1
    assert 0.7 < compared.real.precision < 1
    # Equally many images of one kind have about the same distance.
    assert compared.matched.frechet == pytest.approx(compared.real.frechet, rel=0.4)


def test_the_figures_are_those_of_the_functions(real):
    train, held_out, _ = real
    figures = compare(held_out, Reference(train)).figures
    assert figures.frechet == pytest.approx(frechet_distance(held_out.features, train.features))
    kid = kernel_distance(held_out.features, train.features, subset_size=355)
    assert (figures.kid, figures.kid_std) == kid


def test_sets_of_one_size_are_compared(real):
    """Frechet distance and recall depend on how many images there are."""
    train, held_out, _ = real
    some = held_out[np.arange(0, 355, 3)]
    compared = compare(held_out, Reference(train), some)
    assert compared.matched_size == len(some) == 119
    assert compared.figures.frechet < 0.7 * compared.matched.frechet
    assert compared.matched.frechet == pytest.approx(compared.real.frechet, rel=0.2)
    each = [Reference(train).figures(held_out[i::2][:119]).frechet for i in (0, 1)]
    assert compared.matched.frechet == pytest.approx(np.mean(each), rel=1e-9)
    few = compare(some, Reference(train), held_out)
    assert few.matched == few.figures
    assert few.real != compare(held_out, Reference(train)).figures


def test_a_reference_of_which_mean_and_covariance_are_known(real):
    train, held_out, _ = real
    known = Reference(None, Gaussian.of(train.features))
    compared = compare(held_out, known)
    assert compared.figures.frechet == pytest.approx(
        frechet_distance(held_out.features, train.features)
    )
    rest = dataclasses.asdict(compared.figures)
    assert rest.pop("frechet") > 0
    assert set(rest.values()) == {None}
    assert compared.kid_subset_size is None


def test_the_dictionary_has_every_figure_thrice(real):
    train, held_out, _ = real
    named = compare(held_out[:100], Reference(train), held_out[:50]).as_dict()
    assert named["samples"] == 100
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage", "nearest_min"):
        assert all(isinstance(named[name + end], float) for end in ("", "_matched", "_real"))
    alone = compare(held_out[:100], Reference(train)).as_dict()
    assert named["frechet"] == alone["frechet"]
    assert alone["frechet_real"] is alone["frechet_matched"] is alone["matched_size"] is None


def test_what_cannot_be_compared(real):
    train, held_out, _ = real
    with pytest.raises(DataError, match="at least 6 images are wanted, there are 5"):
        compare(held_out[:5], Reference(train))
    with pytest.raises(DataError, match="at least 6 images are wanted, the held-out set has 5"):
        compare(held_out, Reference(train), held_out[:5])
    with pytest.raises(DataError, match="at least 6 images are wanted, the reference has 3"):
        Reference(train[:3])
    with pytest.raises(DataError, match="needs features or their mean"):
        Reference(Pictures(train.thumbnails))
    with pytest.raises(DataError, match="at least 2 images are wanted, got 1"):
        Pictures.of([torch.zeros(1, 1, 4, 4, dtype=torch.uint8)], progress=False)
    mixed = [torch.zeros(2, channels, 4, 4, dtype=torch.uint8) for channels in (1, 3)]
    with pytest.raises(DataError, match="one number of channels, got 1 and 3"):
        Pictures.of(mixed, progress=False)
    with pytest.raises(InputError, match="finite"):
        as_pixels(torch.full((2, 1, 4, 4), torch.nan))
