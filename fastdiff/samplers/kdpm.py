"""DPM-Solver-2 in EDM's manner, with churn, "DPM2" (k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.samplers.churn import Churned
from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import Keep, Row, check_ratios, pairs


class KDPM2(Churned):
    """The midpoint rule on x / alpha, the middle being that of log r: second order.

    x / alpha changes by (r' - r) eps at the middle, r = sigma / alpha, which is DPM-Solver-2
    (arXiv:2206.00927, algorithm 1). A step takes two evaluations; a last step to r' = 0 takes one,
    since its middle is at 0. ``dpm-2`` is the same method on a grid that has the middles. The
    options are those of :class:`fastdiff.samplers.churn.Churned`.
    """

    name = "kdpm-2"
    default_grid = "karras"

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The second row needs x / alpha at the step's beginning, which the first one keeps."""
        check_ratios(self.name, points)
        churned = self.churned(points)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = churned[i], churned[i + 1]
            if t.sigma == 0:
                yield Row(i, s, x0=t.alpha, level=level)
                continue
            middle = point_at_ratio(self.schedule, math.sqrt(s.ratio * t.ratio))
            keep = Keep(x=end.alpha / s.alpha)
            yield Row(i, s, x0=middle.alpha, eps=middle.sigma, keep=keep, level=level)
            change = end.alpha * (t.ratio - s.ratio)
            yield Row(i, middle, eps=change, history=(1.0,), noise=end.alpha * noise)
