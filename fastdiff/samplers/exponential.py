"""Exponential integrators: the linear part of the diffusion ODE is solved exactly.

As a function of lambda = log(alpha / sigma) the probability-flow ODE is linear in x except for the
prediction f. If f is a polynomial in lambda, a step of length h from s to t is exact (DPM-Solver,
arXiv:2206.00927, eq. 3.4; DPM-Solver++, arXiv:2211.01095, eq. 9):

    x_t = scale x_s + weight_1 f + weight_2 h f' + weight_3 h^2 f'' + ...   (f, f', f'' at s)

with scale = alpha_t / alpha_s, weight_k = -sigma_t h phi_k(h)   if f is eps (NOISE_PREDICTION),
     scale = sigma_t / sigma_s, weight_k = alpha_t h phi_k(-h)   if f is x0 (DATA_PREDICTION).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.samplers.grids import Point
from fastdiff.samplers.sampler import EPS, X0, Keep


@dataclass(frozen=True)
class Form:
    """The exact step in terms of one prediction f.

    Attributes:
        keep: what the history keeps: x0 or eps, which is f.
    """

    keep: Keep

    def scale(self, s: Point, t: Point) -> float:
        """The coefficient of x_s in x_t."""
        return t.sigma / s.sigma if self.keep is X0 else t.alpha / s.alpha

    def weight(self, k: int, s: Point, t: Point) -> float:
        """The coefficient weight_k of the module's formula; for k > 1 it needs a finite h."""
        if k == 1:  # sigma_t h phi_1(h) = sigma_t (e^h - 1), finite also where h is not
            if self.keep is X0:
                return t.alpha - s.alpha * t.sigma / s.sigma
            return t.sigma - s.sigma * t.alpha / s.alpha
        h = t.lam - s.lam
        return t.alpha * h * phi(k, -h) if self.keep is X0 else -t.sigma * h * phi(k, h)

    def coefficient(self, value: float) -> dict[str, float]:
        """The argument of ``Row`` that adds ``value`` times the current prediction f."""
        return {"x0": value} if self.keep is X0 else {"eps": value}


DATA_PREDICTION, NOISE_PREDICTION = Form(X0), Form(EPS)


def phi(k: int, z: float) -> float:
    """phi_0 = e^z, phi_k = (phi_{k-1} - 1 / (k - 1)!) / z, which is the sum of z^n / (n + k)!."""
    if abs(z) < 1:  # where the recursion loses digits
        return math.fsum(z**n / math.factorial(n + k) for n in range(20))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value
