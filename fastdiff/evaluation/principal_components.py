"""A feature space for small data: whitened principal components of the reference's images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.image_grid import from_uint8
from fastdiff.evaluation.pictures import thumbnails

COMPONENTS = 32  # dimensions of the feature space
_ROWS = 2048  # images that are projected at once


class PrincipalComponents:
    """A fixed linear feature space: whitened principal components of real images.

    Each of the first 32 components is scaled to variance 1, so that faint strokes and noise count
    as much as the shape of the figure. The features are deterministic, and no distance between
    features depends on the components' signs. They see pixels and no content: they are for small
    images of one kind, and their distances compare with no others than their own. Images larger
    than 32x32 are averaged to that first.

    Args:
        images: real images, [N, C, S, S], float in [-1, 1] or uint8, N at least 33.

    Attributes:
        description: what the features are, in words.
        explained: share of the images' variance in the components.
    """

    description = f"{COMPONENTS} principal components of the reference"

    def __init__(self, images: Tensor) -> None:
        if len(images) <= COMPONENTS:
            raise ValueError(f"wanted more than {COMPONENTS} images, got {len(images)}")
        self.mean = sum(_flat(part).sum(0) for part in images.split(_ROWS)) / len(images)
        values, vectors = self._components(images)
        top = slice(-1, -COMPONENTS - 1, -1)
        if not (values[top] > 1e-9 * values[-1]).all():
            raise ValueError(
                f"the images vary in fewer than {COMPONENTS} directions, got {len(images)} images "
                f"of shape {tuple(images.shape[1:])}"
            )
        self.projection = vectors[:, top] / np.sqrt(values[top])
        self.explained = float(values[top].sum() / values.sum())

    def _components(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Variances [R], ascending, and directions [D, R] of the principal components."""
        if len(images) < len(self.mean):  # the smaller of the two problems
            _, roots, directions = np.linalg.svd(_flat(images) - self.mean, full_matrices=False)
            return roots[::-1] ** 2 / (len(images) - 1), directions[::-1].T
        gaps = (_flat(part) - self.mean for part in images.split(_ROWS))
        return np.linalg.eigh(sum(gap.T @ gap for gap in gaps) / (len(images) - 1))

    def __call__(self, images: Tensor) -> np.ndarray:
        """Features float64 [N, 32] of images [N, C, S, S], of the dtype and shape of the real."""
        parts = [(_flat(part) - self.mean) @ self.projection for part in images.split(_ROWS)]
        return np.concatenate(parts)


def _flat(images: Tensor) -> np.ndarray:
    """Images [N, C, S, S], no larger than 32x32, as float64 [N, D] in [-1, 1]."""
    images = thumbnails(images.detach().cpu())
    if images.dtype == torch.uint8:
        images = from_uint8(images)
    return images.flatten(1).double().numpy()
