"""Heun's method on the probability-flow ODE, as in EDM (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import Keep, Row, check_ratios, pairs
from fastdiff.samplers.straight import Straight
from fastdiff.schedules import GaussianPath


class Heun(Straight):
    """Two-stage Runge-Kutta methods of second order on x / alpha, r = sigma / alpha.

    With h = r' - r, x / alpha changes by h ((1 - w) eps + w eps'), w = 1 / (2 a): eps' is that at
    the level r + a h, which an Euler step leads to (EDM, algorithm 3 in its appendix D.2). A step
    takes two evaluations; a last step to r' = 0 is an Euler step, with one. In other coordinates,
    see :class:`fastdiff.samplers.straight.Straight`, the same holds of their time and images; with
    all their combinations this is the sampler of EDM's ablations.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        alpha: a, in 0 < a <= 1: where in a step the second evaluation lies. 1 is Heun's method,
            1/2 the midpoint rule, 2/3 Ralston's method.
        **options: see :class:`fastdiff.samplers.straight.Straight`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.straight.Straight`; alpha outside its range.
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
        """The second row needs what x and the first slope give, which the first one keeps."""
        check_ratios(self.name, points)
        churned, along, weight = self.churned(points), self.coordinates, 1 / (2 * self.alpha)
        for i, _, t in pairs(points):
            (s, _, level), (end, noise, _) = churned[i], churned[i + 1]
            unit = end.alpha / along.scale(t.ratio)
            if t.sigma == 0:
                x0, eps = along.moved(s.ratio, 0.0)
                yield Row(i, s, x0=unit * x0, eps=unit * eps, level=level)
                continue
            inside, inner = along.inside(s.ratio, t.ratio, self.alpha), t
            if self.alpha != 1:
                inner = point_at_ratio(self.schedule, inside)
            x0, eps = along.moved(s.ratio, t.ratio, 1 - weight)
            keep = Keep(x0=unit * x0, eps=unit * eps)
            x0, eps = along.moved(s.ratio, t.ratio, self.alpha)
            reached = inner.alpha / along.scale(inside)
            yield Row(i, s, x0=reached * x0, eps=reached * eps, keep=keep, level=level)
            x0, eps = along.tangent(inside)
            later = unit * weight * along.duration(s.ratio, t.ratio)
            yield Row(
                i, inner, x0=later * x0, eps=later * eps, history=(1.0,), noise=end.alpha * noise
            )
