"""Heun's method on the probability-flow ODE, as in EDM (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.euler import Churned
from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import Keep, Row, check_ratios, pairs
from fastdiff.schedules import GaussianPath


class Heun(Churned):
    """Two-stage Runge-Kutta methods of second order on x / alpha, r = sigma / alpha.

    With h = r' - r, x / alpha changes by h ((1 - w) eps + w eps'), w = 1 / (2 a): eps' is that at
    the level r + a h, which an Euler step leads to (EDM, algorithm 3 in its appendix D.2). A step
    takes two evaluations; a last step to r' = 0 is an Euler step, with one.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        alpha: a, in 0 < a <= 1: where in a step the second evaluation lies. 1 is Heun's method,
            1/2 the midpoint rule, 2/3 Ralston's method.
        **options: see :class:`fastdiff.samplers.euler.Churned`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.euler.Churned`; alpha outside its range.
    """

    name = "heun"
    default_grid = "karras"

    def __init__(
        self, schedule: GaussianPath, steps: int = 50, *, alpha: float = 1.0, **options: Any
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in 0 < alpha <= 1, got {alpha}")
        self.alpha = alpha
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The second row needs x / alpha + (1 - w) h eps, which the first one keeps."""
        check_ratios(self.name, points)
        churned, weight = self.churned(points), 1 / (2 * self.alpha)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = churned[i], churned[i + 1]
            if t.sigma == 0:
                yield Row(i, s, x0=t.alpha, level=level)
                continue
            step = t.ratio - s.ratio
            inner = t
            if self.alpha != 1:
                inner = point_at_ratio(self.schedule, s.ratio + self.alpha * step)
            # x / alpha = x0 + r eps
            keep = Keep(x0=end.alpha, eps=end.alpha * (s.ratio + (1 - weight) * step))
            reached = inner.alpha * (s.ratio + self.alpha * step)
            yield Row(i, s, x0=inner.alpha, eps=reached, keep=keep, level=level)
            half = end.alpha * weight * step
            yield Row(i, inner, eps=half, history=(1.0,), noise=end.alpha * noise)
