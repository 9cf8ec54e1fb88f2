"""The linear multistep method in sigma / alpha (Katherine Crowson's k-diffusion)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.quadrature import lagrange_integrals
from fastdiff.samplers.sampler import EPS, Row, Sampler, check_ratios, pairs
from fastdiff.schedules import GaussianPath

MAX_ORDER = 4


class LMS(Sampler):
    """Adams-Bashforth for uneven steps in r = sigma / alpha.

    x / alpha changes by the integral over r of the polynomial in r that interpolates the eps of the
    last steps at their own levels. The ODE for x / alpha is dx/dr = eps (EDM, arXiv:2206.00364,
    eq. 1). The first steps have lower orders, from 1 up.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        order: the number of eps that a step uses, 1 to 4.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; an order out of range, zero
            terminal SNR.
    """

    name = "lms"
    default_grid = "linspace"

    def __init__(
        self, schedule: GaussianPath, steps: int = 50, *, order: int = 4, **options: Any
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order must lie in 1..{MAX_ORDER}, got {order}")
        self.order = order
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One evaluation per step; a step also uses the eps of up to three earlier ones."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            nodes = [point.ratio for point in points[max(i + 1 - self.order, 0) : i + 1][::-1]]
            weights = [t.alpha * w for w in lagrange_integrals(nodes, s.ratio, t.ratio)]
            yield Row(i, s, x=t.alpha / s.alpha, eps=weights[0], history=weights[1:], keep=EPS)
