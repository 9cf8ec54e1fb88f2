"""DEIS, tAB in log rho (Zhang & Chen 2023, arXiv:2204.13902)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastdiff.samplers.exponential import NOISE_PREDICTION
from fastdiff.samplers.grids import Point
from fastdiff.samplers.multistep import lowers_final, multistep_order
from fastdiff.samplers.quadrature import lagrange_integrals
from fastdiff.samplers.sampler import EPS, Row, Sampler, check_choice, check_ratios, pairs
from fastdiff.schedules import GaussianPath


class DEIS(Sampler):
    """x / alpha changes by the integral over rho = sigma / alpha of a polynomial in log rho.

    The polynomial interpolates the eps of the last steps (eq. 15 with log rho as time, the variant
    of section 4 that works best). The first steps have lower orders, from 1 up.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, at least the order.
        order: 2 or 3.
        lower_order_final: see :class:`DPMSolverPPMultistep`.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; fewer steps than the order, zero
            terminal SNR.
    """

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        order: int = 2,
        lower_order_final: bool | None = None,
        **options: Any,
    ) -> None:
        self.name = f"deis-{order}"
        check_choice("order", order, (2, 3))
        self.order = self.minimum_steps = order
        self.lower_order_final = lowers_final(lower_order_final, steps)
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One evaluation per step; a step also uses the eps of up to two earlier ones."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            order = multistep_order(points, i, self.order, self.lower_order_final)
            weights = [NOISE_PREDICTION.weight(1, s, t)]
            if order > 1:  # d rho = e^u du with u = log rho = -lambda
                nodes = [-point.lam for point in points[i + 1 - order : i + 1][::-1]]
                weights = [
                    t.alpha * w for w in lagrange_integrals(nodes, -s.lam, -t.lam, weight=np.exp)
                ]
            scale = NOISE_PREDICTION.scale(s, t)
            yield Row(i, s, x=scale, eps=weights[0], history=weights[1:], keep=EPS)
