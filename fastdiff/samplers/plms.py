"""PNDM's linear multistep method, PLMS (Liu et al. 2022, arXiv:2202.09778)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import EPS, Row, Sampler, check_ratios, pairs
from fastdiff.schedules import GaussianPath

ADAMS_BASHFORTH = {  # by order, the weights of the eps, the latest first; order 4 is eq. 12
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMS(Sampler):
    """DDIM's step with an Adams-Bashforth mean of the last four eps (eq. 11 and 12).

    The first step evaluates the model at both of its ends and takes the mean, as Stable Diffusion's
    and diffusers' PLMS do in place of the paper's Runge-Kutta start: S steps make S + 1
    evaluations. The weights are those for evenly spaced steps, whatever the grid.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, 1..T.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; zero terminal SNR.
    """

    name = "plms"
    default_grid = "leading"

    def __init__(self, schedule: GaussianPath, steps: int = 50, **options: Any) -> None:
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Two evaluations for the first step, then one per step."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            x = t.alpha / s.alpha
            eps = t.sigma - x * s.sigma
            weights = ADAMS_BASHFORTH[min(i + 1, 4)]
            history = [eps * weight for weight in weights[1:]]
            yield Row(i, s, x=x, eps=eps * weights[0], history=history, keep=EPS)
            if i == 0 and len(points) > 2:  # from x + eps * first to x + eps * (first + second) / 2
                yield Row(i, t, x=1.0, eps=eps / 2, history=(-eps / 2,))
