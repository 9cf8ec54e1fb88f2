"""Compare a set of images with a reference, and held-out real images with the same reference."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from fastdiff.common.errors import DataError
from fastdiff.evaluation.distances import (
    KERNEL_SUBSET_SIZE,
    Gaussian,
    kernel_distance,
    nearest_distances,
)
from fastdiff.evaluation.manifolds import DENSITY_NEIGHBOURS, Manifold
from fastdiff.evaluation.pictures import Pictures


@dataclass(frozen=True)
class Figures:
    """How far a set of images is from a reference; None where the reference does not tell.

    Attributes:
        frechet: Frechet distance of the features, :func:`~fastdiff.evaluation.frechet_distance`;
            with Inception features the FID.
        kid: kernel distance, :func:`~fastdiff.evaluation.kernel_distance`; with Inception features
            the KID.
        kid_std: standard deviation of the kernel distance over its subsets.
        precision: share of the images that look like the reference's.
        recall: share of the reference's images that look like these.
        density: how densely the reference lies around the images; 1 if they are alike.
        coverage: share of the reference's images with one of these near.
        nearest_median: median over the images of the Euclidean distance to the nearest image of the
            reference, of pixels in [-1, 1] at no more than 32x32. A copy has distance 0.
        nearest_min: the smallest such distance.
    """

    frechet: float
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    nearest_median: float | None = None
    nearest_min: float | None = None


class Reference:
    """Real images that others are held to; what is computed of them is kept.

    Args:
        pictures: with features; None if no more than their Gaussian is known.
        gaussian: of the features, where it is known; else it is that of ``pictures``.

    Raises:
        DataError: neither, or too few images.
    """

    def __init__(self, pictures: Pictures | None, gaussian: Gaussian | None = None) -> None:
        if pictures is not None:
            _check_count(pictures, "the reference has")
        if gaussian is None:
            if pictures is None or pictures.features is None:
                raise DataError("a reference needs features or their mean and covariance")
            gaussian = Gaussian.of(pictures.features)
        self.pictures, self.gaussian = pictures, gaussian

    @cached_property
    def _manifold(self) -> Manifold:
        assert self.pictures is not None
        assert self.pictures.features is not None
        return Manifold(self.pictures.features)

    def figures(self, images: Pictures) -> Figures:
        """Compare images, with features of the same space, with the reference."""
        features = images.features
        assert features is not None
        frechet = self.gaussian.frechet(Gaussian.of(features))
        if self.pictures is None:
            return Figures(frechet)
        real = self.pictures.features
        assert real is not None
        size = kernel_subset_size(len(real), len(features))
        kid, kid_std = kernel_distance(features, real, subset_size=size)
        nearest = nearest_distances(images.thumbnails, self.pictures.thumbnails)
        return Figures(
            frechet,
            kid,
            kid_std,
            **self._manifold.coverage_of(Manifold(features)),
            nearest_median=float(np.median(nearest)),
            nearest_min=float(nearest.min()),
        )


@dataclass(frozen=True)
class Comparison:
    """Figures of a set of images, and of held-out real images where there are some.

    Most figures depend on how many images there are. So images and held-out images are also
    compared in sets of one size, ``matched_size``: disjoint sets of the images, over which the
    figures are averaged, and as many held-out images. Each set is spread over the images' order.

    Attributes:
        figures: of all images.
        matched: of the images in sets of the size of the held-out set; None without one.
        real: of held-out real images: the score of a perfect model.
        images: number of images.
        matched_size: images in a set.
        kid_subset_size: features in a subset of the kernel distance of all images.
    """

    figures: Figures
    matched: Figures | None
    real: Figures | None
    images: int
    matched_size: int | None
    kid_subset_size: int | None

    def as_dict(self) -> dict[str, Any]:
        """The figures by name; those of sets end in ``_matched``, those of real ones in ``_real``.

        Figures that the reference does not tell are None.
        """
        named: dict[str, Any] = {
            "samples": self.images,
            "matched_size": self.matched_size,
            "kid_subset_size": self.kid_subset_size,
        }
        for suffix, figures in (
            ("", self.figures),
            ("_matched", self.matched),
            ("_real", self.real),
        ):
            for field in fields(Figures):
                value = None if figures is None else getattr(figures, field.name)
                named[field.name + suffix] = value
        return named


def compare(images: Pictures, reference: Reference, held_out: Pictures | None = None) -> Comparison:
    """Compare images with a reference, beside held-out real images if there are some.

    Raises:
        DataError: fewer than 6 images in one of the sets.
    """
    _check_count(images, "there are")
    known = reference.pictures
    subset = None if known is None else kernel_subset_size(len(known), len(images))
    figures = reference.figures(images)
    if held_out is None:
        return Comparison(figures, None, None, len(images), None, subset)
    _check_count(held_out, "the held-out set has")
    size = min(len(images), len(held_out))
    if size == len(images):
        matched = figures
    else:
        sets = len(images) // size  # each has images from all over, for the order may be by class
        parts = (images[first::sets][:size] for first in range(sets))
        matched = _mean([reference.figures(part) for part in parts])
    chosen = np.linspace(0, len(held_out) - 1, size).round().astype(int)
    real = reference.figures(held_out[chosen])
    return Comparison(figures, matched, real, len(images), size, subset)


def kernel_subset_size(*counts: int) -> int:
    """Features in a subset of the kernel distance: 1000, or all of a smaller set."""
    return min(KERNEL_SUBSET_SIZE, *counts)


def _mean(several: list[Figures]) -> Figures:
    values: dict[str, Any] = {}
    for field in fields(Figures):
        each = [getattr(figures, field.name) for figures in several]
        values[field.name] = None if each[0] is None else float(np.mean(each))
    return Figures(**values)


def _check_count(pictures: Pictures, who: str) -> None:
    if len(pictures) <= DENSITY_NEIGHBOURS:
        raise DataError(
            f"at least {DENSITY_NEIGHBOURS + 1} images are wanted, {who} {len(pictures)}"
        )
