"""Multistep DPM-Solver++, for the ODE and for the SDE (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.exponential import DATA_PREDICTION, phi
from fastdiff.samplers.grids import Point
from fastdiff.samplers.multistep import lowers_final, multistep_order
from fastdiff.samplers.sampler import X0, Row, Sampler, check_amounts, check_choice, pairs
from fastdiff.schedules import GaussianPath

SOLVER_TYPES = ("midpoint", "heun")


class DPMSolverPPMultistep(Sampler):
    """DPM-Solver++(2M) and (3M): derivatives come from the x0 of earlier steps (algorithm 2).

    The first steps have lower orders, from 1 up. The third order takes f'' as twice the second
    divided difference, which is exact for a parabola; the authors' code takes it once, which leaves
    an error of second order.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, at least the order.
        order: 2 or 3.
        solver_type: for order 2, midpoint (the paper's) or heun (the exact integral of a line).
        lower_order_final: take the last steps at lower orders; None does so for fewer than 15
            steps. A step to zero noise is always of first order.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; an unknown solver type, fewer steps than
            the order.
    """

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        order: int = 2,
        solver_type: str = "midpoint",
        lower_order_final: bool | None = None,
        **options: Any,
    ) -> None:
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.name = f"dpmpp-{order}m"
        check_choice("order", order, (2, 3))
        self.order = self.minimum_steps = order
        self.solver_type = solver_type
        self.lower_order_final = lowers_final(lower_order_final, steps)
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """One evaluation per step; a step also uses the x0 of up to two earlier ones."""
        for i, s, t in pairs(points):
            order = multistep_order(points, i, self.order, self.lower_order_final)
            now, *history = self._weights(points[max(i - order + 1, 0) : i + 1], t)
            yield Row(i, s, x=DATA_PREDICTION.scale(s, t), x0=now, history=history, keep=X0)

    def _weights(self, points: list[Point], t: Point) -> list[float]:
        """Weights in x_t of the x0 at up to three points, the latest point first."""
        s = points[-1]
        first = DATA_PREDICTION.weight(1, s, t)
        if len(points) == 1:
            return [first]
        h = t.lam - s.lam
        r1 = (s.lam - points[-2].lam) / h
        if len(points) == 2:  # h f' = (f_0 - f_1) / r1
            midpoint = self.solver_type == "midpoint"
            second = first / 2 if midpoint else DATA_PREDICTION.weight(2, s, t)
            return [first + second / r1, -second / r1]
        r2 = (points[-2].lam - points[-3].lam) / h
        second, third = DATA_PREDICTION.weight(2, s, t), DATA_PREDICTION.weight(3, s, t)
        return _from_three(first, second, 2 * third, r1, r2)


class DPMSolverPP2MSDE(Sampler):
    """SDE-DPM-Solver++(2M): the reverse-time SDE in second order (appendix B of arXiv:2211.01095).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, at least 2.
        eta: strength of the noise, at least 0: 1 is the reverse SDE of the forward process, 0 the
            ODE.
        s_noise: standard deviation of the noise added.
        solver_type: midpoint or heun.
        lower_order_final: see :class:`DPMSolverPPMultistep`.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; negative eta or s_noise, unknown solver
            type.
    """

    name = "dpmpp-2m-sde"
    minimum_steps = 2

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        eta: float = 1.0,
        s_noise: float = 1.0,
        solver_type: str = "midpoint",
        lower_order_final: bool | None = None,
        **options: Any,
    ) -> None:
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        check_amounts(eta=eta, s_noise=s_noise)
        self.eta, self.s_noise, self.solver_type = eta, s_noise, solver_type
        self.lower_order_final = lowers_final(lower_order_final, steps)
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """The ODE's h becomes (1 + eta) h, and noise sigma_t sqrt(1 - e^(-2 eta h)) is added."""
        for i, s, t in pairs(points):
            h = t.lam - s.lam
            decay = math.exp(-self.eta * h) if self.eta else 1.0
            x = t.sigma / s.sigma * decay
            first = t.alpha - s.alpha * x
            now, history = first, []
            if multistep_order(points, i, 2, self.lower_order_final) == 2:
                z = (1 + self.eta) * h
                second = first / 2 if self.solver_type == "midpoint" else t.alpha * z * phi(2, -z)
                second *= h / (s.lam - points[i - 1].lam)
                now, history = first + second, [-second]
            noise = t.sigma * math.sqrt(1 - decay**2) * self.s_noise
            yield Row(i, s, x=x, x0=now, history=history, noise=noise, keep=X0)


class DPMSolverPP3MSDE(Sampler):
    """SDE-DPM-Solver++ over three values, "DPM++ 3M SDE" (k-diffusion).

    The reverse-time SDE of :class:`DPMSolverPP2MSDE` with the parabola through the x0 of three
    steps. Without noise it is DPM-Solver++(3M).

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, at least 3.
        eta: strength of the noise, at least 0: 1 is the reverse SDE of the forward process, 0 the
            ODE.
        s_noise: standard deviation of the noise added.
        solver_type: "parabola" takes f'' as twice the second divided difference, which is exact for
            a parabola. "k-diffusion" takes it once as k-diffusion does, which leaves an error of
            second order: use it to reproduce its images.
        lower_order_final: see :class:`DPMSolverPPMultistep`.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; negative eta or s_noise, unknown solver
            type.
    """

    name = "dpmpp-3m-sde"
    minimum_steps = 3

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        eta: float = 1.0,
        s_noise: float = 1.0,
        solver_type: str = "parabola",
        lower_order_final: bool | None = None,
        **options: Any,
    ) -> None:
        check_choice("solver_type", solver_type, ("parabola", "k-diffusion"))
        check_amounts(eta=eta, s_noise=s_noise)
        self.eta, self.s_noise, self.solver_type = eta, s_noise, solver_type
        self.lower_order_final = lowers_final(lower_order_final, steps)
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """As in 2M SDE; the x0 of the last three steps are interpolated over (1 + eta) h."""
        for i, s, t in pairs(points):
            h = t.lam - s.lam
            decay = math.exp(-self.eta * h) if self.eta else 1.0
            x = t.sigma / s.sigma * decay
            order = multistep_order(points, i, 3, self.lower_order_final)
            first = t.alpha - s.alpha * x
            now, *history = self._weights(first, points[max(i - order + 1, 0) : i + 1], t)
            noise = t.sigma * math.sqrt(1 - decay**2) * self.s_noise
            yield Row(i, s, x=x, x0=now, history=history, noise=noise, keep=X0)

    def _weights(self, first: float, points: list[Point], t: Point) -> list[float]:
        """Weights in x_t of the x0 at up to three points, the latest point first."""
        if len(points) == 1:
            return [first]
        s = points[-1]
        h = t.lam - s.lam
        z = (1 + self.eta) * h
        r1 = (s.lam - points[-2].lam) / h
        second = t.alpha * z * phi(2, -z)
        if len(points) == 2:
            return [first + second / r1, -second / r1]
        r2 = (points[-2].lam - points[-3].lam) / h
        times = 2 if self.solver_type == "parabola" else 1
        return _from_three(first, second, times * t.alpha * z * phi(3, -z), r1, r2)


def _from_three(first: float, second: float, curved: float, r1: float, r2: float) -> list[float]:
    """first f_0 + second d + curved c as weights of f_0, f_1 and f_2, the latest value first.

    With d1 = (f_0 - f_1) / r1 and d2 = (f_1 - f_2) / r2, the second divided difference is
    c = (d1 - d2) / (r1 + r2). The parabola through the three values has the derivatives
    h f' = d = d1 + r1 c and h^2 f'' = 2 c.
    """
    curve = (second * r1 + curved) / (r1 + r2)
    one, two = (second + curve) / r1, curve / r2  # the weights of f_0 - f_1 and of f_2 - f_1
    return [first + one, -one - two, two]
