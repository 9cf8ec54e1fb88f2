"""Euler's method on the probability-flow ODE, with EDM's churn (arXiv:2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import Row, Sampler, check_amounts, pairs
from fastdiff.schedules import GaussianPath


class Churned(Sampler):
    """What Euler's and Heun's method share: noise that is added before a step (algorithm 2).

    At a point with noise level r = sigma / alpha, fresh noise first raises it to r (1 + gamma) with
    gamma = min(churn / S, sqrt(2) - 1); there the model is evaluated. The noise is drawn by the row
    before, and the first x is drawn at its raised level at once.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        s_churn: amount of noise over the whole run; 0 is deterministic.
        s_tmin: churn only at levels r from here
        s_tmax: to here.
        s_noise: standard deviation of the noise added.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; negative churn.
    """

    default_grid = "linspace"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 50,
        *,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        **options: Any,
    ) -> None:
        check_amounts(s_churn=s_churn, s_noise=s_noise)
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = s_churn, s_tmin, s_tmax, s_noise
        self.gamma = min(s_churn / max(steps, 1), math.sqrt(2) - 1)  # of the whole run's S
        super().__init__(schedule, steps, **options)

    def raised(self, points: list[Point]) -> list[tuple[Point, float]]:
        """Every point at its raised level, and the noise that takes x there (in units of r).

        The last point stays: no step begins there.
        """
        out = []
        for point in points[:-1]:
            churns = self.s_tmin <= point.ratio <= self.s_tmax and point.ratio < math.inf
            if self.gamma > 0 and churns:
                hat = point_at_ratio(self.schedule, point.ratio * (1 + self.gamma))
                out.append((hat, self.s_noise * math.sqrt(hat.ratio**2 - point.ratio**2)))
            else:
                out.append((point, 0.0))
        return [*out, (points[-1], 0.0)]


class Euler(Churned):
    """x / alpha moves by (r' - r) eps, r = sigma / alpha (arXiv:2206.00364, eq. 4 and algorithm 2).

    Without churn this is DDIM. Options as :class:`Churned` has them.
    """

    name = "euler"

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One straight step from every point to the next."""
        raised = self.raised(points)
        for i, _, t in pairs(points):
            (s, _), (end, noise) = raised[i], raised[i + 1]
            yield Row(i, s, x0=end.alpha, eps=end.alpha * t.ratio, noise=end.alpha * noise)
