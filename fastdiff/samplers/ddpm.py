"""Ancestral sampling of DDPM and improved DDPM (arXiv:2006.11239, arXiv:2102.09672)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_choice, pairs
from fastdiff.schedules import GaussianPath

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


class DDPM(Sampler):
    """x' = mean of q(x_{t-1} | x_t, x0) + sigma_t z (arXiv:2006.11239, algorithm 2 and eq. 7).

    With fewer steps than T the chain is the respaced schedule's, whose betas are
    1 - abar_t / abar_prev (arXiv:2102.09672, section 4). The last step adds no noise.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T; None for all T.
        variance: how sigma^2 is chosen. With v the second half of the model's channels:

            fixed_small    beta_tilde
            fixed_large    beta
            learned        exp(v)
            learned_range  log sigma^2 lies between log beta_tilde (v = -1) and log beta (v = 1)
                           (arXiv:2102.09672, eq. 15)

        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; unknown variance.
    """

    name = "ddpm"
    default_grid = "leading"
    default_clip = (-1.0, 1.0)

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int | None = None,
        *,
        variance: str = "fixed_small",
        **options: Any,
    ) -> None:
        check_choice("variance", variance, VARIANCES)
        self.variance = variance
        super().__init__(schedule, schedule.num_timesteps if steps is None else steps, **options)

    @property
    def learned_variance(self) -> bool:
        """Whether the model's output gives the variance."""
        return self.variance.startswith("learned")

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The posterior's mean and variance between neighbouring points."""
        log_small = None
        for i, s, t in pairs(points):
            share = s.alpha / t.alpha  # the share of x_t's signal that is left in x_s
            beta = s.sigma**2 - (share * t.sigma) ** 2  # variance of q(x_s | x_t)
            if t.sigma > 0:
                log_small = math.log(beta * t.sigma**2 / s.sigma**2)
            elif log_small is None:  # a single step: there is no earlier log_small to repeat
                log_small = math.log(beta)
            logvar, logvar_v = _log_variance(self.variance, log_small, math.log(beta))
            yield Row(
                i,
                s,
                x=share * t.sigma**2 / s.sigma**2,
                x0=t.alpha * beta / s.sigma**2,
                noise=1.0 if i < len(points) - 2 else 0.0,
                logvar=logvar,
                logvar_v=logvar_v,
            )


def _log_variance(variance: str, small: float, large: float) -> tuple[float, float]:
    """(constant, factor of v) such that log sigma^2 = constant + factor v."""
    return {
        "fixed_small": (small, 0.0),
        "fixed_large": (large, 0.0),
        "learned": (0.0, 1.0),
        "learned_range": ((small + large) / 2, (large - small) / 2),
    }[variance]
