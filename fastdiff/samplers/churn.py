"""Noise that is added before a step, which EDM calls churn (Karras et al. 2022)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastdiff.samplers.grids import (
    SAME_LEVEL_RTOL,
    Point,
    nearest_timestep,
    point_at_ratio,
    point_at_time,
)
from fastdiff.samplers.sampler import Sampler, check_amounts
from fastdiff.schedules import GaussianPath


class ChurnedPoint(NamedTuple):
    """The point at which a step begins after its noise has been added.

    Attributes:
        at: the point at the raised noise level, whose time the model is given.
        noise: standard deviation of the added noise, in units of r = sigma / alpha; 0 for none.
        level: actual alpha and sigma of x; None where they are equal to those of ``at``.
    """

    at: Point
    noise: float = 0.0
    level: tuple[float, float] | None = None


class Churned(Sampler):
    """EDM's churn: noise that is added before a step (arXiv:2206.00364, algorithm 2).

    At a point with noise level r = sigma / alpha, fresh noise first raises the level to
    r' = r (1 + gamma) with gamma = min(s_churn / S, sqrt(2) - 1). The model is evaluated there. The
    previous row adds the noise; the initial x has it from the start, with variance
    r^2 + s_noise^2 (r'^2 - r^2).

    With ``round_levels`` r' is the level of a timestep, too.

    No level is raised beyond the one of timestep T - 1, the last that the model knows. There is no
    such limit on a path of ``fastdiff.sde.EDM``: as in the paper, a run from sigma 80 with the
    largest gamma begins at 113.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        s_churn: amount of noise over the whole run; 0 is deterministic.
        s_tmin: smallest level r at which noise is added.
        s_tmax: largest level r at which noise is added.
        s_noise: standard deviation of the noise added.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; negative s_churn or s_noise.
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
        self.gamma = min(s_churn / max(steps, 1), math.sqrt(2) - 1)
        super().__init__(schedule, steps, **options)

    def churned(self, points: list[Point]) -> list[ChurnedPoint]:
        """Every point at its raised level; the last one stays, since no step begins there."""
        return [*(self._churned(point) for point in points[:-1]), ChurnedPoint(points[-1])]

    def _churned(self, point: Point) -> ChurnedPoint:
        ratio = min(point.ratio * (1 + self.gamma), self._largest_ratio)
        low, high = self.s_tmin * (1 - SAME_LEVEL_RTOL), self.s_tmax * (1 + SAME_LEVEL_RTOL)
        if not (low <= point.ratio <= high and point.ratio < ratio):
            return ChurnedPoint(point)
        if self.round_levels:
            at = nearest_timestep(self.schedule, ratio)
            ratio = at.ratio
            if ratio == point.ratio:  # too little noise to reach the next level
                return ChurnedPoint(point)
        else:
            at = point_at_ratio(self.schedule, ratio)
        noise = self.s_noise * math.sqrt(ratio**2 - point.ratio**2)
        return ChurnedPoint(at, noise, (at.alpha, at.alpha * math.hypot(point.ratio, noise)))

    @property
    def _largest_ratio(self) -> float:
        if self.schedule.extends:
            return math.inf
        return point_at_time(self.schedule, self.schedule.num_timesteps - 1).ratio
