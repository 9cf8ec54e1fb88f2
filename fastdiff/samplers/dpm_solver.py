"""Singlestep DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927, arXiv:2211.01095)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from fastdiff.samplers.exponential import DATA_PREDICTION, NOISE_PREDICTION, Form
from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import Row, Sampler, check_choice, check_ratios, pairs
from fastdiff.schedules import GaussianPath

SOLVER_TYPES = ("midpoint", "heun", "diffusers")


class Singlestep(Sampler):
    """Steps of order k, each over k points of the grid and without values from earlier steps.

    The model is evaluated once at each point: S counts evaluations, as in the paper's
    DPM-Solver-fast (arXiv:2206.00927, section 3.4), and k evaluations make one step of order k. The
    intermediate points are points of the grid. On a grid that is even in lambda they are the
    paper's r_1 and r_2; on any smooth grid they tend to them, as the third order needs.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: evaluations of the model, at least the order.
        order: k.
        solver_type: how derivatives are taken:

            midpoint   the paper's algorithms 1 and 2
            heun       from the parabola through the three values of a third-order step
            diffusers  midpoint, except that u_2 of a third-order step has (e^(r_2 h) - 1) / 2 where
                       algorithm 2 has (e^(r_2 h) - 1) / (r_2 h) - 1. Still third order, with an
                       error up to 3.3 times as large: use it to reproduce images of diffusers.

        lower_order_final: end with steps of decreasing order, as DPM-Solver-fast does. A last step
            to zero noise and a first step from zero signal are always of first order.
        **options: see :class:`fastdiff.samplers.Sampler`.

    Raises:
        ValueError: see :class:`fastdiff.samplers.Sampler`; an unknown solver type, fewer steps than
            the order, or zero terminal SNR with DPM-Solver.
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
        """Step by step, each over the points of its group."""
        if self.form is NOISE_PREDICTION:
            check_ratios(self.name, points)
        begin = 0
        for size in self._groups(points):
            group = points[begin : begin + size + 1]
            for j, row in enumerate(stages(self.form, begin, group, self.solver_type)):
                yield replace(row, step=begin + j)
            begin += size

    def _groups(self, points: list[Point]) -> list[int]:
        """The order of each step, which is also its number of points."""
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


def stages(
    form: Form, step: int, points: list[Point], solver_type: str = "midpoint"
) -> Iterator[Row]:
    """The rows of one singlestep step, which evaluates the model at all of its points but the last.

    x at the start of the step is recovered from the current x in each row.

    Args:
        form: DPM-Solver in terms of eps or DPM-Solver++ in terms of x0.
        step: the step's number.
        points: where the step begins, its one or two points between, and where it ends.
        solver_type: see :class:`Singlestep`.
    """
    size = len(points) - 1
    before = [0.0] * 3  # the current x = scale * x_s + sum_k before[k] * value_k
    for j, u, t in pairs(points):
        weights = stage_weights(form, points[: j + 1], t, size, solver_type)
        back = form.scale(u, t)  # scale(s, t) / scale(s, u)
        now = [a - back * b for a, b in zip(weights, before, strict=True)]
        history = [now[k] for k in reversed(range(j))]
        value = form.coefficient(now[j])
        yield Row(step, u, x=back, history=history, keep=form.keep, **value)  # type: ignore[arg-type]
        before = weights


def stage_weights(
    form: Form, points: list[Point], t: Point, size: int, solver_type: str = "midpoint"
) -> list[float]:
    """Weights in x_t of the predictions at up to three points so far of a singlestep step.

    x_t is form.scale(s, t) times x_s, s being the first point, plus the weighted predictions.

    Args:
        form: see :func:`stages`.
        points: the step's points so far, one to three.
        t: the step's end if ``points`` are all of its points, else the next one.
        size: the number of its points, its order.
        solver_type: see :class:`Singlestep`.
    """
    s = points[0]
    first = form.weight(1, s, t)
    if len(points) == 1:
        return [first, 0.0, 0.0]
    h = t.lam - s.lam
    r1 = (points[1].lam - s.lam) / h
    if len(points) == 2:  # h f' = (f_1 - f_0) / r1
        # Algorithm 1 takes half the first weight; u_2 of algorithm 2 takes the second weight.
        halved = {"midpoint": size == 2, "heun": False, "diffusers": True}[solver_type]
        second = first / 2 if halved else form.weight(2, s, t)
        return [first - second / r1, second / r1, 0.0]
    r2 = (points[2].lam - s.lam) / h
    second = form.weight(2, s, t)
    if solver_type != "heun":  # h f' = (f_2 - f_0) / r2: algorithm 2
        return [first - second / r2, 0.0, second / r2]
    third = form.weight(3, s, t)  # f', f'' of the parabola through the three values
    one = (second * r2 - 2 * third) / (r1 * (r2 - r1))
    two = (2 * third - second * r1) / (r2 * (r2 - r1))
    return [first - one - two, one, two]


class DPMSolver(Singlestep):
    """DPM-Solver-1, -2 and -3, in terms of eps (arXiv:2206.00927, eq. 3.7, algorithms 1 and 2)."""

    form = NOISE_PREDICTION

    def __init__(
        self, schedule: GaussianPath, steps: int = 20, *, order: int = 2, **options: Any
    ) -> None:
        self.name = f"dpm-{order}"
        super().__init__(schedule, steps, order=order, **options)


class DPMSolverPPSinglestep(Singlestep):
    """DPM-Solver++(1S) and (2S), in terms of x0 (arXiv:2211.01095, algorithm 1)."""

    form = DATA_PREDICTION

    def __init__(
        self, schedule: GaussianPath, steps: int = 20, *, order: int = 2, **options: Any
    ) -> None:
        self.name = f"dpmpp-{order}s"
        super().__init__(schedule, steps, order=order, **options)
