"""Euler's method on the probability-flow ODE, with EDM's churn (arXiv:2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastdiff.samplers.grids import ROUNDING, Point, point_at_ratio, point_at_time
from fastdiff.samplers.sampler import Row, Sampler, check_amounts, pairs
from fastdiff.schedules import GaussianPath


class Raised(NamedTuple):
    """Where a step begins once its noise has been added.

    Attributes:
        at: the raised point, which the model is told of.
        noise: deviation of the added noise, in units of r = sigma / alpha; 0 where none is.
        level: alpha and sigma of x there; None where they are those of ``at``.
    """

    at: Point
    noise: float = 0.0
    level: tuple[float, float] | None = None


class Churned(Sampler):
    """What Euler's and Heun's method share: noise that is added before a step (algorithm 2).

    At a point with noise level r = sigma / alpha, fresh noise first raises it to r' = r (1 + gamma)
    with gamma = min(churn / S, sqrt(2) - 1); there the model is evaluated. The noise is drawn by
    the row before. The first x is drawn with the variance of both its parts at once, r^2 +
    s_noise^2 (r'^2 - r^2).

    No level is raised beyond the last one that a model of the path can be told of: that of timestep
    T - 1, and any at all on a path of the process ``fastdiff.sde.EDM``, where a run from sigma 80
    with the largest gamma begins at 113, as in the paper.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        s_churn: amount of noise over the whole run; 0 is deterministic.
        s_tmin: churn only at levels r from here
        s_tmax: to here, both included.
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

    def raised(self, points: list[Point]) -> list[Raised]:
        """Every point at its raised level; the last one stays, since no step begins there."""
        return [*(self._raised(point) for point in points[:-1]), Raised(points[-1])]

    def _raised(self, point: Point) -> Raised:
        ratio = min(point.ratio * (1 + self.gamma), self._largest_ratio)
        low, high = self.s_tmin * (1 - ROUNDING), self.s_tmax * (1 + ROUNDING)
        if not (low <= point.ratio <= high and point.ratio < ratio):
            return Raised(point)
        at = point_at_ratio(self.schedule, ratio)
        noise = self.s_noise * math.sqrt(ratio**2 - point.ratio**2)
        return Raised(at, noise, (at.alpha, at.alpha * math.hypot(point.ratio, noise)))

    @property
    def _largest_ratio(self) -> float:
        if self.schedule.extends:
            return math.inf
        return point_at_time(self.schedule, self.schedule.num_timesteps - 1).ratio


class Euler(Churned):
    """x / alpha moves by (r' - r) eps, r = sigma / alpha (arXiv:2206.00364, eq. 4 and algorithm 2).

    Without churn this is DDIM. Options as :class:`Churned` has them.
    """

    name = "euler"

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One straight step from every point to the next."""
        raised = self.raised(points)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = raised[i], raised[i + 1]
            yield Row(
                i, s, x0=end.alpha, eps=end.alpha * t.ratio, noise=end.alpha * noise, level=level
            )
