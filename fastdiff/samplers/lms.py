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
    """x / alpha moves by the integral over r = sigma / alpha of a polynomial in r: Adams-Bashforth.

    The polynomial goes through the eps of the last steps, at the levels where they were found: the
    weights are right for uneven steps. The ODE is dx/dr = eps (EDM, arXiv:2206.00364, eq. 1).
    Orders begin at 1 and rise.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        order: how many eps are used, 1 to 4.
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
        """One evaluation a step, and up to three from before."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            nodes = [point.ratio for point in points[max(i + 1 - self.order, 0) : i + 1][::-1]]
            weights = [t.alpha * w for w in lagrange_integrals(nodes, s.ratio, t.ratio)]
            yield Row(i, s, x=t.alpha / s.alpha, eps=weights[0], history=weights[1:], keep=EPS)
