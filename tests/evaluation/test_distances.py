"""Distances between sets of features and of images: closed forms, naive formulas, copies."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fastdiff.evaluation import (
    Gaussian,
    distances,
    frechet_distance,
    kernel_distance,
    nearest_distances,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def with_moments(mean, deviations, count=64):
    """Features whose sample mean is exactly ``mean`` and whose covariance is exactly diagonal."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((count, len(mean)))
    raw -= raw.mean(0)
    orthogonal, _ = np.linalg.qr(raw)
    return np.asarray(mean) + orthogonal * np.sqrt(count - 1) * np.asarray(deviations)


# The Frechet distance.


def test_frechet_distance_of_diagonal_gaussians():
    """|m_x - m_y|^2 + sum (s_x - s_y)^2 (Dowson & Landau 1982)."""
    mean_x, mean_y = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    std_x, std_y = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.7])
    wanted = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    x, y = with_moments(mean_x, std_x), with_moments(mean_y, std_y, count=40)
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(wanted, rel=1e-7)


def test_frechet_distance_of_general_gaussians():
    """It is invariant to rotations, which make the covariances full; and to no others."""
    x = with_moments([1.0, 0.0, 3.0], [1.0, 2.0, 0.5])
    y = with_moments([0.0, 0.0, 1.0], [0.5, 1.0, 2.0])
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert abs(frechet_distance(x @ turn, y) - frechet_distance(x, y)) > 0.1


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Against the matrix square root of C_x C_y, by its own eigenvalues."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((60, 4)) @ rng.standard_normal((4, 4))
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real).sum()
    gap = x.mean(0) - y.mean(0)
    wanted = gap @ gap + np.trace(cov_x) + np.trace(cov_y) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_to_itself_is_zero():
    x = np.random.default_rng(3).standard_normal((30, 5))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)
    assert frechet_distance(x[:, :1], x[:, :1] * 3) == pytest.approx(
        4 * x[:, 0].mean() ** 2 + 4 * x[:, 0].var(ddof=1), rel=1e-9
    )


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(np.zeros((5, 3)), np.zeros((5, 2)), id="other features"),
        pytest.param(np.zeros((1, 3)), np.zeros((5, 3)), id="one image"),
        pytest.param(np.zeros(5), np.zeros(5), id="vectors"),
    ],
)
def test_features_that_cannot_be_compared(x, y):
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(x, y)


def test_nothing_of_scipy_is_needed_for_the_distance(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    x = with_moments([0.0, 0.0], [1.0, 1.0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_gaussian_is_that_of_its_features():
    x, y = (np.random.default_rng(i).standard_normal((40, 6)) for i in (0, 1))
    known = Gaussian.of_moments(y.mean(0), np.cov(y.T))
    np.testing.assert_allclose(known.cov, np.cov(y.T), atol=1e-12)
    assert known.frechet(Gaussian.of(x)) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    narrow = Gaussian.of(x.astype(np.float32))
    assert narrow.cov.dtype == np.float64
    np.testing.assert_allclose(narrow.cov, np.cov(x.T), atol=1e-6)
    with pytest.raises(ValueError, match="features have 6 and 5 dimensions"):
        known.frechet(Gaussian.of(x[:, :5]))


def test_fewer_features_than_dimensions():
    """Against eigenvalues of the product of the covariances, which are singular."""
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((7, 20)), rng.standard_normal((31, 20)) + 1
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex)).real.sum()
    gap = x.mean(0) - y.mean(0)
    wanted = gap @ gap + np.trace(cov_x) + np.trace(cov_y) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


# The kernel distance.


def test_kernel_distance_is_the_unbiased_estimate():
    """Over whole sets, by the sums of equation 4 of Binkowski et al. 2018, written out."""
    x, y = (np.random.default_rng(i).standard_normal((7, 3)) + i for i in (0, 1))

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    across = sum(kernel(a, b) for a in x for b in y) / 49
    mean, std = kernel_distance(x, y, subsets=2, subset_size=7)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_zero_between_sets_of_one_kind_and_grows_apart():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 600, 8))
    mean, std = kernel_distance(x, y, subset_size=100)
    assert abs(mean) < std
    near, far = (kernel_distance(x, y + gap, subset_size=100)[0] for gap in (0.3, 0.6))
    assert std < near < far


@pytest.mark.parametrize(
    ("x", "y", "size", "message"),
    [
        pytest.param((5, 3), (5, 2), 5, r"got \(5, 3\) and \(5, 2\)", id="other features"),
        pytest.param((5, 3), (4, 3), 5, "from 2 to 4 features, got 5", id="too large a subset"),
        pytest.param((5, 3), (4, 3), 1, "from 2 to 4 features, got 1", id="one feature"),
    ],
)
def test_what_has_no_kernel_distance(x, y, size, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(np.zeros(x), np.zeros(y), subset_size=size)


# The nearest image.


def test_nearest_distances():
    others = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).view(2, 1, 1, 2)
    images = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]]).view(3, 1, 1, 2)
    assert nearest_distances(images, others).tolist() == [1.0, 0.0, 5.0]


def test_nearest_distances_of_pixels_are_exact(monkeypatch):
    """Blocks of every size give the same distances; only a copy has distance 0."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(0, 256, (11, 3, 32, 32), generator=generator).to(torch.uint8)
    images = torch.randint(0, 256, (7, 3, 32, 32), generator=generator).to(torch.uint8)
    images[2] = others[10]
    images[3] = others[4]
    images[3, 0, 0, 0] ^= 1
    gaps = (images[:, None].double() - others[None].double()).flatten(2).norm(dim=2) / 127.5
    wanted = gaps.amin(1).numpy()
    assert wanted[2] == 0
    assert wanted[3] == 1 / 127.5
    for rows in (1, 4, 2048):
        monkeypatch.setattr(distances, "_ROWS", rows)
        found = nearest_distances(images, others)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found[[2, 3]], wanted[[2, 3]])
        np.testing.assert_allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), id="another dtype"),
        pytest.param(torch.zeros(2, 3, 4, 4), id="more channels"),
        pytest.param(torch.zeros(0, 1, 4, 4), id="no images"),
    ],
)
def test_images_that_have_no_nearest(others):
    with pytest.raises(ValueError, match="shape and dtype of the others"):
        nearest_distances(torch.zeros(2, 1, 4, 4), others)
