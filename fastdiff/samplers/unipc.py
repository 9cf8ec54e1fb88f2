"""UniPC: a predictor-corrector method of any order (Zhao et al. 2023, arXiv:2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from fastdiff.samplers.exponential import DATA_PREDICTION, phi
from fastdiff.samplers.grids import Point
from fastdiff.samplers.multistep import multistep_order
from fastdiff.samplers.sampler import X0, Row, Sampler, check_choice, combine, pairs
from fastdiff.schedules import GaussianPath

SOLVER_TYPES = ("bh1", "bh2")


class UniPC(Sampler):
    """UniP-p predicts x at the next point, UniC-p corrects it with the x0 predicted there.

    Algorithms 5 to 8 of the paper. The model is not evaluated at the corrected x, so the corrector
    is free, and it raises the order to p + 1. Predictor and corrector start from the same x, so
    their results differ by a sum of x0 alone. A row adds this sum to the predicted x and then
    predicts the next x.

    Args:
        schedule: the noise schedule that the model was trained on.
        steps: steps to take, at least the order.
        order: p, 1 to 3.
        solver_type: B(h) = h (bh1) or e^h - 1 (bh2), section 3.1; bh2 is better with guidance.
        disable_corrector: numbers of the steps whose result is not corrected.
        lower_order_final: take the last steps at lower orders. A step to zero noise is always of
            first order.
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
        solver_type: str = "bh2",
        disable_corrector: Collection[int] = (),
        lower_order_final: bool = True,
        **options: Any,
    ) -> None:
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        check_choice("order", order, (1, 2, 3))
        self.name = f"unipc-{order}"
        self.order = self.minimum_steps = order
        self.solver_type = solver_type
        self.disable_corrector = frozenset(disable_corrector)
        self.lower_order_final = lower_order_final
        super().__init__(schedule, steps, **options)

    def rows(self, points: list[Point]) -> Iterator[Row]:
        """Correct, then predict; both are weighted sums of the current and earlier x0."""
        order = 0
        for i, s, t in pairs(points):
            change = [0.0]
            if i > 0 and i - 1 not in self.disable_corrector and self._corrects(points[i - 1], s):
                known = points[i - order : i][::-1]  # the points whose x0 the last prediction used
                predicted = [0.0, *self._predictor(known, s)]
                change = combine((1.0, self._corrector(known, s)), (-1.0, predicted))
            order = multistep_order(points, i, self.order, self.lower_order_final)
            known = points[i + 1 - order : i + 1][::-1]
            scale = DATA_PREDICTION.scale(s, t)
            now, *history = combine((scale, change), (1.0, self._predictor(known, t)))
            yield Row(i, s, x=scale, x0=now, history=history, keep=X0)

    def _corrects(self, s: Point, t: Point) -> bool:
        return math.isfinite(self._b(s.lam - t.lam))  # not for bh1 if s has no signal

    def _predictor(self, known: list[Point], t: Point) -> list[float]:
        """Weights in x_t of the x0 at ``known`` points, the latest point first."""
        s = known[0]
        first = DATA_PREDICTION.weight(1, s, t)
        if len(known) == 1:
            return [first]
        z = s.lam - t.lam
        ratios = [(point.lam - s.lam) / -z for point in known[1:]]
        # With one earlier point any weight 1/2 + O(h) keeps the order; the authors take 1/2.
        rho = [0.5] if len(ratios) == 1 else self._solve(ratios, z)
        return self._differences(first, rho, ratios, z, t)

    def _corrector(self, known: list[Point], t: Point) -> list[float]:
        """Weights in x_t of the x0 at t and, after it, at ``known`` points, the latest first."""
        s = known[0]
        first = DATA_PREDICTION.weight(1, s, t)
        z = s.lam - t.lam
        ratios = [1.0, *((point.lam - s.lam) / -z for point in known[1:])]
        rho = [0.5] if len(ratios) == 1 else self._solve(ratios, z)
        at_s, at_t, *others = self._differences(first, rho, ratios, z, t)
        return [at_t, at_s, *others]

    def _differences(
        self, first: float, rho: list[float], ratios: list[float], z: float, t: Point
    ) -> list[float]:
        """first f_0 - alpha_t B sum_k rho_k (f_k - f_0) / r_k as weights of f_0, f_1, ..."""
        scale = -t.alpha * self._b(z)
        weights = [scale * a / r for a, r in zip(rho, ratios, strict=True)]
        return [first - math.fsum(weights), *weights]

    def _b(self, z: float) -> float:
        return z if self.solver_type == "bh1" else math.expm1(z)

    def _solve(self, ratios: list[float], z: float) -> list[float]:
        """The rho for which the step is exact for polynomials (section 3.2, theorem 3.1)."""
        count = len(ratios)
        powers = np.vander(ratios, count, increasing=True).T  # r^(n - 1)
        wanted = [math.factorial(n) * z * phi(n + 1, z) / self._b(z) for n in range(1, count + 1)]
        return np.linalg.solve(powers, wanted).tolist()
