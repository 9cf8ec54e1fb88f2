"""DPM-Solver++ for the SDE with two evaluations per step, "DPM++ SDE" (k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.euler_ancestral import ancestral
from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import (
    Keep,
    Row,
    Sampler,
    check_amounts,
    check_ratios,
    check_share,
    pairs,
)
from fastdiff.schedules import GaussianPath


class DPMSolverPPSDE(Sampler):
    """DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1) with ancestral noise in both stages.

    A stage from r to r' maps x / alpha to (r_down / r) x + (1 - r_down / r) x0 + r_up z, see
    :class:`EulerAncestral`. The first stage goes halfway in lambda. The second goes all the way
    from the same start, with the x0 predicted at the midpoint. Both follow one noise path: the part
    of the first stage's noise that survives until the step's end is also in the second stage.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, of two evaluations each; a step to zero noise takes one.
        eta: share of the ancestral noise, in [0, 1]; 0 is the ODE.
        s_noise: standard deviation of the noise added.
        r: the position of the second evaluation between the step's ends, in lambda, in (0, 1).
        shared_noise: False leaves the two stages' noises to whoever draws them, as k-diffusion
            does: each row then has all of its stage's noise, r_up. Drawn independently, they make
            the method one of first order.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; eta, r or s_noise out of range, zero
            terminal SNR.
    """

    name = "dpmpp-sde"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        eta: float = 1.0,
        s_noise: float = 1.0,
        r: float = 0.5,
        shared_noise: bool = True,
        **options: Any,
    ) -> None:
        check_share("eta", eta)
        check_amounts(s_noise=s_noise)
        if not 0 < r < 1:
            raise ValueError(f"r must lie in (0, 1), got {r}")
        self.eta, self.s_noise, self.r, self.shared_noise = eta, s_noise, r, shared_noise
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The first row keeps a sum of its x, x0 and noise; the second adds its x0 and noise."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            if t.sigma == 0:
                yield Row(i, s, x0=t.alpha)
                continue
            middle = point_at_ratio(self.schedule, s.ratio * (t.ratio / s.ratio) ** self.r)
            half_down, half_up = ancestral(s.ratio, middle.ratio, self.eta)
            down, up = ancestral(s.ratio, t.ratio, self.eta)
            shared = 0.0
            if self.shared_noise:
                shared = half_up * ancestral(middle.ratio, t.ratio, self.eta)[0] / middle.ratio
            fresh = math.sqrt(max(up**2 - shared**2, 0.0))
            share, weight = down / s.ratio, 1 / (2 * self.r)
            yield Row(
                i,
                s,
                x=middle.alpha / s.alpha * half_down / s.ratio,
                x0=middle.alpha * (1 - half_down / s.ratio),
                noise=middle.alpha * half_up * self.s_noise,
                keep=Keep(
                    x=t.alpha / s.alpha * share,
                    x0=t.alpha * (1 - share) * (1 - weight),
                    noise=t.alpha * shared * self.s_noise,
                ),
            )
            yield Row(
                i,
                middle,
                x0=t.alpha * (1 - share) * weight,
                history=(1.0,),
                noise=t.alpha * fresh * self.s_noise,
            )
