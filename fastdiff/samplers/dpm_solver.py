"""Singlestep DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927, arXiv:2211.01095)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from fastdiff.samplers.exponential import DATA, NOISE, Form
from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_choice, check_ratios
from fastdiff.schedules import GaussianPath

SOLVER_TYPES = ("midpoint", "heun", "diffusers")


class Singlestep(Sampler):
    """A step of order k from s over k points of the grid, all by values between its own ends.

    The model is evaluated once a point: S counts evaluations, as in the paper's DPM-Solver-fast
    (arXiv:2206.00927, section 3.4), and a group of k of them is one step of order k. The points
    between are those of the grid, which for an even grid in lambda are the paper's r_1, r_2, and
    for any smooth one tend to them, as the third order needs.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: evaluations of the model, at least the order.
        order: k.
        solver_type: how derivatives are taken: midpoint (the paper's algorithms 1 and 2), heun (the
            parabola through the three values of a third-order step), or diffusers, which is
            midpoint but for the second point within a third-order step: its u_2 has
            (e^(r_2 h) - 1) / 2 where algorithm 2 has (e^(r_2 h) - 1) / (r_2 h) - 1. That is of
            third order still, with an error up to 3.3 times as large; it is there to reproduce
            images of diffusers.
        lower_order_final: end in groups of falling order, as DPM-Solver-fast does; a last step to
            zero noise, or a first one from zero signal, is of first order in any case.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; an unknown solver type, fewer steps than
            the order, for DPM-Solver zero terminal SNR.
    """

    form: ClassVar[Form]

    def __init__(
        self,
        schedule: GaussianPath,
        steps: int = 20,
        *,
        order: int,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        **options: Any,
    ) -> None:
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        check_choice("order", order, (1, 2, 3))
        self.order = self.minimum_steps = order
        self.solver_type = solver_type
        self.lower_order_final = lower_order_final
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Group by group; x at the start of a group is had back from the current x."""
        if self.form is NOISE:
            check_ratios(self.name, points)
        begin = 0
        for size in self._groups(points):
            before = [0.0] * 3  # the current x is scale * x_s + these times the group's values
            for j in range(size):
                u, t = points[begin + j], points[begin + j + 1]
                weights = self._weights(points[begin : begin + j + 1], t, size)
                back = self.form.scale(u, t)  # scale(s, t) / scale(s, u)
                now = [a - back * b for a, b in zip(weights, before, strict=True)]
                history = [now[k] for k in reversed(range(j))]
                yield Row(
                    begin + j,
                    u,
                    x=back,
                    history=history,
                    keep=self.form.keep,
                    **self.form.of(now[j]),  # type: ignore[arg-type]
                )
                before = weights
            begin += size

    def _weights(self, points: list[Point], t: Point, size: int) -> list[float]:
        """Weights in x_t of the values at up to three points, of which the first is s.

        The points begin a group of ``size``: t ends it where there are as many.
        """
        form, s = self.form, points[0]
        first = form.weight(1, s, t)
        if len(points) == 1:
            return [first, 0.0, 0.0]
        h = t.lam - s.lam
        r1 = (points[1].lam - s.lam) / h
        if len(points) == 2:  # h f' = (f_1 - f_0) / r1
            # Algorithm 1 halves the first weight; to u_2 of algorithm 2 the second one leads.
            halved = {"midpoint": size == 2, "heun": False, "diffusers": True}[self.solver_type]
            second = first / 2 if halved else form.weight(2, s, t)
            return [first - second / r1, second / r1, 0.0]
        r2 = (points[2].lam - s.lam) / h
        second = form.weight(2, s, t)
        if self.solver_type != "heun":  # h f' = (f_2 - f_0) / r2: algorithm 2
            return [first - second / r2, 0.0, second / r2]
        third = form.weight(3, s, t)  # f', f'' of the parabola through the three values
        one = (second * r2 - 2 * third) / (r1 * (r2 - r1))
        two = (2 * third - second * r1) / (r2 * (r2 - r1))
        return [first - one - two, one, two]

    def _groups(self, points: list[Point]) -> list[int]:
        """Orders of the steps that lead through the points."""
        steps, to_zero, k = len(points) - 1, points[-1].sigma == 0, self.order
        if points[0].alpha == 0 and steps > 1:  # zero terminal SNR: lambda is infinite there
            return [1, *self._groups(points[1:])]
        if not self.lower_order_final:
            sizes = [k] * (steps // k) + [steps % k] * (steps % k > 0)
        elif k == 3:
            rest = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
            sizes = [3] * ((steps - sum(rest)) // 3) + rest
        else:
            full = (steps - 1) // k
            sizes = [k] * full + [1] * (steps - k * full)
        if to_zero and sizes[-1] > 1:
            sizes[-1:] = [sizes[-1] - 1, 1]
        return sizes


class DPMSolver(Singlestep):
    """DPM-Solver-1, -2 and -3: in eps (arXiv:2206.00927, eq. 3.7, algorithms 1 and 2)."""

    form = NOISE

    def __init__(
        self, schedule: GaussianPath, steps: int = 20, *, order: int = 2, **options: Any
    ) -> None:
        self.name = f"dpm-{order}"
        super().__init__(schedule, steps, order=order, **options)


class DPMSolverPPSinglestep(Singlestep):
    """DPM-Solver++(1S) and (2S): in x0 (arXiv:2211.01095, algorithm 1)."""

    form = DATA

    def __init__(
        self, schedule: GaussianPath, steps: int = 20, *, order: int = 2, **options: Any
    ) -> None:
        self.name = f"dpmpp-{order}s"
        super().__init__(schedule, steps, order=order, **options)
