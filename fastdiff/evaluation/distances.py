"""Distances between two sets of images: Frechet, kernel, and that of each image to the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.common.progress import progress_bar

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, KERNEL_SEED = 100, 1000, 2020  # torch-fidelity's defaults
_ROWS = 2048  # images of each set whose distances are computed at once


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set of features.

    Attributes:
        mean: float64 [D].
        factor: float64 [R, D], whose ``factor.T @ factor`` is the covariance.
    """

    mean: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """The sample mean and the unbiased sample covariance of features [N, D], N at least 2."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be [N, D] with N >= 2, got {features.shape}")
        mean = features.mean(0, dtype=np.float64)
        gaps = (features - mean) / np.sqrt(len(features) - 1)
        # Fewer features than dimensions are a factor themselves, and so make all products small.
        if len(gaps) > len(mean):
            gaps = np.asarray(np.linalg.qr(gaps, mode="r"))
        return cls(mean, gaps)

    @classmethod
    def of_moments(cls, mean: np.ndarray, cov: np.ndarray) -> Gaussian:
        """The Gaussian of a mean [D] and a covariance [D, D]."""
        values, vectors = np.linalg.eigh(cov.astype(np.float64))
        return cls(mean.astype(np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)

    @property
    def cov(self) -> np.ndarray:
        """The covariance, float64 [D, D]."""
        cov: np.ndarray = self.factor.T @ self.factor
        return cov

    def frechet(self, other: Gaussian) -> float:
        """Squared Frechet distance |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)).

        Equation 6 of Heusel et al. 2017, arXiv:1706.08500 (Dowson & Landau 1982).
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features have {len(self.mean)} and {len(other.mean)} dimensions")
        # With C_x = A'A and C_y = B'B the eigenvalues of (C_x C_y)^(1/2) are the singular values of
        # AB'. So nothing is squared, of which a root would have to be taken again.
        cross = np.linalg.svd(self.factor @ other.factor.T, compute_uv=False).sum()
        gap = self.mean - other.mean
        traces = np.square(self.factor).sum() + np.square(other.factor).sum()
        return float(gap @ gap + traces - 2 * cross)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features.

    The estimate is biased upwards by an amount that falls as 1 / the size of the smaller set, so
    compare figures only of sets of the same size.

    Args:
        x: features [N, D], N at least 2.
        y: features [M, D], M at least 2.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [N, D] and [M, D], got {x.shape} and {y.shape}")
    return Gaussian.of(x).frechet(Gaussian.of(y))


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    *,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = KERNEL_SEED,
    progress: bool = False,
) -> tuple[float, float]:
    """Kernel distance: the squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    The unbiased estimate of Binkowski et al. 2018, arXiv:1801.01401, averaged over pairs of random
    subsets. With Inception features it is the KID. Subsets and estimate are those of
    torch-fidelity, so that the numbers agree.

    Args:
        x: features [N, D], N at least ``subset_size``.
        y: features [M, D], M at least ``subset_size``.
        subsets: number of pairs of subsets.
        subset_size: features in a subset, at least 2.
        seed: of the choice of subsets.
        progress: show a progress bar on standard error.

    Returns:
        Mean and standard deviation over the subsets.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {x.shape} and {y.shape}")
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"a subset must have from 2 to {min(len(x), len(y))} features, got {subset_size}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in progress_bar(range(subsets), desc="kernel distance", shown=progress, leave=False):
        chosen_x = x[rng.choice(len(x), subset_size, replace=False)].astype(np.float64)
        chosen_y = y[rng.choice(len(y), subset_size, replace=False)].astype(np.float64)
        within = sum(_mean_of_pairs(chosen) for chosen in (chosen_x, chosen_y))
        values.append(within - 2 * _kernel(chosen_x, chosen_y).mean())
    return float(np.mean(values)), float(np.std(values))


def nearest_distances(images: Tensor, others: Tensor) -> np.ndarray:
    """Euclidean distance of each image to the nearest of others, of values in [-1, 1].

    Args:
        images: [N, C, S, S], float in [-1, 1], or uint8, whose 0 and 255 stand for -1 and 1.
        others: [M, C, S, S] of the same dtype, M at least 1.

    Returns:
        float64 [N], exactly 0 for an image that is among the others.
    """
    if images.shape[1:] != others.shape[1:] or images.dtype != others.dtype or not len(others):
        raise ValueError(
            "images must have the shape and dtype of the others, got "
            f"{tuple(images.shape)}, {images.dtype} and {tuple(others.shape)}, {others.dtype}"
        )
    exact = images.dtype == torch.uint8
    blocks = []
    for block in _flat(images).split(_ROWS):
        wide = block.double()
        nearest = torch.full((len(block),), torch.inf, dtype=torch.float64, device="cpu")
        for part in _flat(others).split(_ROWS):
            squares = _integer_squares if exact else _squares
            nearest = torch.minimum(nearest, squares(wide, part.double()).amin(1))
        blocks.append(nearest.sqrt())
    return (torch.cat(blocks) / (127.5 if exact else 1)).numpy()


def _flat(images: Tensor) -> Tensor:
    return images.detach().cpu().flatten(1)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M], each the sum of squared differences."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _integer_squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M] of integers, by a product of matrices: in float64 it is exact."""
    ends = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(ends, x, y.T, alpha=-2)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return values


def _mean_of_pairs(x: np.ndarray) -> float:
    """The kernel's mean over pairs of two different features."""
    kernel = _kernel(x, x)
    count = len(x)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
