"""Heun's method on the probability-flow ODE, as in EDM (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.samplers.euler import Churned
from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Keep, Row, check_ratios, pairs


class Heun(Churned):
    """An Euler step, repeated with the mean of eps at both ends: second order (algorithm 2).

    x / alpha changes by (r' - r) (eps + eps') / 2, r = sigma / alpha. A step takes two evaluations;
    a last step to r' = 0 takes one, since there is no second eps. The options are those of
    :class:`fastdiff.samplers.euler.Churned`.
    """

    name = "heun"
    default_grid = "karras"

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The second row needs x / alpha + (r' - r) / 2 eps, which the first one keeps."""
        check_ratios(self.name, points)
        churned = self.churned(points)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = churned[i], churned[i + 1]
            if t.sigma == 0:
                yield Row(i, s, x0=t.alpha, level=level)
                continue
            mean = end.alpha * (s.ratio + t.ratio) / 2  # x / alpha = x0 + r eps
            keep = Keep(x0=end.alpha, eps=mean)
            yield Row(i, s, x0=t.alpha, eps=t.alpha * t.ratio, keep=keep, level=level)
            half = end.alpha * (t.ratio - s.ratio) / 2
            yield Row(i, t, eps=half, history=(1.0,), noise=end.alpha * noise)
