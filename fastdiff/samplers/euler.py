"""Euler's method on the probability-flow ODE (arXiv:2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, pairs
from fastdiff.samplers.straight import Straight


class Euler(Straight):
    """x / alpha changes by (r' - r) eps, r = sigma / alpha (arXiv:2206.00364, eq. 4, algorithm 2).

    Without churn this is DDIM. The options are those of :class:`fastdiff.samplers.churn.Churned`
    and :class:`fastdiff.samplers.straight.Straight`, by which steps are straight in other
    coordinates than r.
    """

    name = "euler"

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One straight step from every point to the next."""
        churned = self.churned(points)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = churned[i], churned[i + 1]
            x0, eps = self.coordinates.moved(s.ratio, t.ratio)
            unit = end.alpha / self.coordinates.scale(t.ratio)
            yield Row(i, s, x0=unit * x0, eps=unit * eps, noise=end.alpha * noise, level=level)
