"""Euler's method with ancestral noise, "Euler a" (Katherine Crowson's k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_amounts, check_share, pairs
from fastdiff.schedules import GaussianPath


class EulerAncestral(Sampler):
    """An Euler step below the next noise level, and fresh noise up to it.

    With r = sigma / alpha, r_up^2 = eta^2 r'^2 (1 - r'^2 / r^2) is the variance of DDPM's posterior
    (arXiv:2006.11239, eq. 7) where the image is not scaled, and r_down^2 = r'^2 - r_up^2.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        eta: share of that noise; 0 is Euler's method, 1 DDPM. In [0, 1].
        s_noise: standard deviation of the noise added.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; eta outside [0, 1], negative
            s_noise.
    """

    name = "euler-ancestral"
    default_grid = "linspace"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 50,
        *,
        eta: float = 1.0,
        s_noise: float = 1.0,
        **options: Any,
    ) -> None:
        check_share("eta", eta)
        check_amounts(s_noise=s_noise)
        self.eta, self.s_noise = eta, s_noise
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One step and one draw from every point to the next."""
        for i, s, t in pairs(points):
            down, up = ancestral(s.ratio, t.ratio, self.eta)
            yield Row(i, s, x0=t.alpha, eps=t.alpha * down, noise=t.alpha * up * self.s_noise)


def ancestral(start: float, end: float, eta: float) -> tuple[float, float]:
    """r_down and r_up of a step between two noise levels r."""
    up = eta * end * math.sqrt(1 - (end / start) ** 2)
    return math.sqrt(end**2 - up**2), up
