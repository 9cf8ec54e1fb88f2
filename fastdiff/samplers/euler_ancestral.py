"""Euler's method with ancestral noise, "Euler a" (Katherine Crowson's k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_amounts, check_share, pairs
from fastdiff.schedules import GaussianPath


class EulerAncestral(Sampler):
    """An Euler step from level r to r_down, below the next level r', then noise r_up up to r'.

    r = sigma / alpha, r_up^2 = eta^2 r'^2 (1 - r'^2 / r^2) and r_down^2 = r'^2 - r_up^2. For
    eta = 1, r_up^2 is the variance of DDPM's posterior (arXiv:2006.11239, eq. 7) of x / alpha.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        eta: share of the ancestral noise, in [0, 1]; 0 is Euler's method, 1 is DDPM.
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
        """One Euler step and fresh noise from every point to the next."""
        for i, s, t in pairs(points):
            down, up = ancestral(s.ratio, t.ratio, self.eta)
            yield Row(i, s, x0=t.alpha, eps=t.alpha * down, noise=t.alpha * up * self.s_noise)


def ancestral(start: float, end: float, eta: float) -> tuple[float, float]:
    """r_down and r_up of a step from level ``start`` to level ``end``, see :class:`EulerAncestral`.

    Args:
        start: the level r = sigma / alpha at which the step begins.
        end: the level at which it ends.
        eta: share of the ancestral noise.
    """
    up = eta * end * math.sqrt(1 - (end / start) ** 2)
    # sqrt(end^2 - up^2), without the difference of two almost equal numbers.
    return end * math.hypot(math.sqrt(1 - eta**2), eta * end / start), up
