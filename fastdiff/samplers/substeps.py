"""DPM-Solver and DPM-Solver++ whose steps have evaluations between the points of the grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from fastdiff.samplers.dpm_solver import stages
from fastdiff.samplers.euler_ancestral import ancestral
from fastdiff.samplers.exponential import DATA_PREDICTION, NOISE_PREDICTION, Form
from fastdiff.samplers.grids import Point, point_at_ratio
from fastdiff.samplers.sampler import (
    Row,
    Sampler,
    check_amounts,
    check_ratios,
    check_share,
    pairs,
)
from fastdiff.schedules import GaussianPath


class Substeps(Sampler):
    """A step of order k evaluates the model at its start and at k - 1 even places in lambda.

    With noise the step goes from level r to r_down below the next level r', see
    :class:`fastdiff.samplers.euler_ancestral.EulerAncestral`, and noise r_up leads back to r'. A
    last step to zero noise has order 1.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take.
        eta: share of the ancestral noise, in [0, 1].
        s_noise: standard deviation of the noise added.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; eta outside [0, 1], negative s_noise,
            zero terminal SNR.
    """

    form: ClassVar[Form]
    default_grid = "karras"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
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
        """All rows of a step but the last lead to points between; the last one adds the noise."""
        check_ratios(self.name, points)
        for i, s, t in pairs(points):
            down, up = self._levels(s, t, points[-1])
            to = Point(t.t, t.alpha, t.alpha * down)  # x there is already scaled as at t
            order = 1 if down == 0 else self._order(len(points) - 1 - i)
            inner = [
                point_at_ratio(self.schedule, s.ratio * (down / s.ratio) ** (j / order))
                for j in range(1, order)
            ]
            *others, last = stages(self.form, i, [s, *inner, to])
            yield from others
            yield replace(last, noise=t.alpha * up * self.s_noise)

    def _levels(self, s: Point, t: Point, end: Point) -> tuple[float, float]:
        """r_down and r_up of a step from s to t, in a run that goes to ``end``."""
        return ancestral(s.ratio, t.ratio, self.eta)

    def _order(self, left: int) -> int:
        """The order of a step when ``left`` steps are left, itself among them."""
        return 2


class DPM2Ancestral(Substeps):
    """DPM-Solver-2 (arXiv:2206.00927, algorithm 1) with ancestral noise (k-diffusion).

    The options are those of :class:`Substeps`.
    """

    name = "dpm-2-ancestral"
    form = NOISE_PREDICTION


class DPMSolverPP2SAncestral(Substeps):
    """DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1) with ancestral noise (k-diffusion).

    The options are those of :class:`Substeps`.
    """

    name = "dpmpp-2s-ancestral"
    form = DATA_PREDICTION


class DPMSolverFast(Substeps):
    """DPM-Solver-fast: steps of order 3, the last of lower (arXiv:2206.00927, section 3.4).

    For n evaluations the paper takes S = floor(n / 3) + 1 steps, even in lambda, of orders
    3, ..., 3, 2, 1 if n is a multiple of 3, else 3, ..., 3 and the remainder. No step goes below
    the last level before its noise is added, so that the last step adds none.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: S.
        evaluations: n, in 3 S - 3 to 3 S - 1; None is 3 S - 2, which ends with a step of order 1.
        eta: share of the ancestral noise, in [0, 1]; 0, the paper's method, is the ODE.
        **options: see :class:`Substeps`.

    Raises:
        ValueError: see :class:`Substeps`; ``evaluations`` out of its range, or 3 S - 1 if the last
            step, of order 2, leads to zero noise.
    """

    name = "dpm-fast"
    form = NOISE_PREDICTION
    default_grid = "logsnr"

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 7,
        *,
        evaluations: int | None = None,
        eta: float = 0.0,
        **options: Any,
    ) -> None:
        self.remainder = 1 if evaluations is None else evaluations - 3 * (steps - 1)
        if not (self.remainder in (1, 2) or (self.remainder == 0 and steps > 1)):
            raise ValueError(
                f"{steps} steps take {max(3 * steps - 3, 1)} to {3 * steps - 1} evaluations, "
                f"got {evaluations}"
            )
        super().__init__(schedule, steps, eta=eta, **options)
        if self.remainder == 2 and self.points[-1].sigma == 0:
            raise ValueError(
                f"a last step to zero noise has order 1: with {steps} steps wanted at most "
                f"{3 * steps - 2} evaluations, got {evaluations}"
            )

    def _levels(self, s: Point, t: Point, end: Point) -> tuple[float, float]:
        down = max(ancestral(s.ratio, t.ratio, self.eta)[0], end.ratio)
        return down, math.sqrt(max(t.ratio**2 - down**2, 0.0))

    def _order(self, left: int) -> int:
        if left == 1:
            return max(self.remainder, 1)
        return 2 if left == 2 and self.remainder == 0 else 3
