"""Precision, recall, density and coverage against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.evaluation import Manifold, manifolds

pytestmark = pytest.mark.usefixtures("one_thread")


def by_definition(generated, real):
    def apart(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    def radius(points, k):
        return np.sort(apart(points, points), axis=1)[:, k]

    between = apart(generated, real)
    inside = between < radius(real, 5)
    return {
        "precision": (between <= radius(real, 3)).any(1).mean(),
        "recall": (radius(generated, 3) >= between.T).any(1).mean(),
        "density": inside.sum(1).mean() / 5,
        "coverage": inside.any(0).mean(),
    }


@pytest.mark.parametrize("entries", [1, 100, 2**24])
def test_against_the_definitions(entries, monkeypatch):
    monkeypatch.setattr(manifolds, "_ENTRIES", entries)
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((41, 4)), 0.8 * rng.standard_normal((67, 4)) + 0.4
    found = Manifold(real).coverage_of(Manifold(generated))
    wanted = by_definition(generated, real)
    assert found == pytest.approx(wanted)
    assert len({round(value, 6) for value in wanted.values()}) == 4  # four figures, not one


def test_sets_of_one_kind_cover_each_other_and_lost_modes_are_missed():
    rng = np.random.default_rng(1)
    real = np.concatenate([rng.standard_normal((100, 3)) - 9, rng.standard_normal((100, 3)) + 9])
    alike = Manifold(real).coverage_of(Manifold(real.copy()))
    assert alike["precision"] == alike["recall"] == alike["coverage"] == 1
    half = Manifold(real).coverage_of(Manifold(real[:100] + 0.01))
    assert half["precision"] == 1
    assert half["recall"] == half["coverage"] == 0.5
    away = Manifold(real).coverage_of(Manifold(real + 50))
    assert set(away.values()) == {0.0}


@pytest.mark.parametrize("shape", [(5, 3), (9,)])
def test_features_without_neighbours(shape):
    with pytest.raises(ValueError, match=r"features must be \[N, D\] with N > 5"):
        Manifold(np.zeros(shape))
