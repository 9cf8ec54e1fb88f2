"""Steps of the reverse-time SDE with an error estimate, for ``fastdiff.sde.solve_adaptive``.

A scheme moves images along a position that increases by steps of h. Its noise is a Brownian path in
another variable, the clock. A scheme defines the first and last position, the default and largest
step sizes, and how the error depends on the step size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.processes import SDE
from fastdiff.sde.score import Score, prediction_fn

State = tuple[Tensor, ...]  # values of each image that a scheme keeps between steps, [M, ...]


@dataclass(frozen=True)
class Attempt:
    """The result of a step that may be accepted or rejected.

    Attributes:
        low: the images after the step in the lower order.
        high: the images in the higher order, which are kept; high - low is the error.
        state: the scheme's state after the step, if it is accepted.
    """

    low: Tensor
    high: Tensor
    state: State


class ImprovedEuler:
    """Euler-Maruyama and the stochastic improved Euler method with the same noise.

    Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, algorithm 1: two evaluations per step. The
    position is -t.
    """

    cost = 2
    eps_rel = 0.05
    safety, exponent, growth = 0.9, 0.9, float("inf")  # theta and r of the paper

    def __init__(self, sde: SDE) -> None:
        self.sde = sde
        self.first, self.last = -sde.end, -sde.smallest
        self.h_init, self.h_max = sde.end / 100, float("inf")

    def time(self, position: Tensor) -> Tensor:
        """The time of the process at a position."""
        return -position

    def clock(self, position: Tensor, h: Tensor) -> Tensor:
        """The Brownian path's change of time in a step of h."""
        return h

    def begin(self, x: Tensor, score: Score) -> State:
        """The state before the first step: none."""
        return ()

    def attempt(
        self, x: Tensor, state: State, start: Tensor, stop: Tensor, noise: Tensor, score: Score
    ) -> Attempt:
        """A step of images x [M, ...] from positions ``start`` to ``stop``, float64 [M].

        ``noise`` [M, ...] are the Brownian path's increments.
        """
        h, times = stop - start, (self.time(start), self.time(stop))
        euler = x + self._change(x, times[0], h, noise, score)
        improved = (euler + x + self._change(euler, times[1], h, noise, score)) / 2
        return Attempt(euler, improved, ())

    def denoised(self, x: Tensor, state: State, score: Score) -> Tensor:
        """The mean of x_0 given x at the end (Tweedie's formula), by one more evaluation."""
        return prediction_fn(score, "x0", self.sde)(x, self.time(_filled(x, self.last)))

    def _change(self, x: Tensor, t: Tensor, h: Tensor, noise: Tensor, score: Score) -> Tensor:
        """The change of x in an Euler-Maruyama step of h with the slopes at x and t."""
        f, squared = self.sde.rates(t)
        return (
            beside(h * squared, x) * score(x, t)
            - beside(h * f, x) * x
            + beside(squared.sqrt(), x) * noise
        )


class Exponential:
    """The exact solution for a clean image D(x_t, t) that is linear in lambda along the step.

    With lambda = log(alpha / sigma) and h its change from t to s, the reverse-time SDE is solved by

        x_s = A x_t + alpha_s int_0^h 2 e^{2 (u - h)} D du + sigma_s sqrt(1 - e^{-2h}) z,
        A = psi_s / psi_t,   psi = sigma^2 / alpha

    (SDE-DPM-Solver++, Lu et al. 2022, arXiv:2211.01095, section 5), for every linear SDE. The
    predictor extrapolates D along its last change (two-step Adams-Bashforth). D is evaluated at the
    predicted images, and the corrector interpolates it. The next step uses this evaluation without
    repeating it at the corrected images, as in UniPC (Zhao et al. 2023, arXiv:2302.04867). So a
    step, also a rejected one, takes one evaluation. The difference between prediction and
    correction is the error. The noise of a step is psi_s times the increment of a Brownian path
    whose time is the signal-to-noise ratio e^{2 lambda}, so that shorter steps can share it.
    """

    cost = 1
    eps_rel = 0.1
    h_init, h_max = 0.3, 0.85
    safety, exponent, growth = 0.9, 0.5, 2.0

    def __init__(self, sde: SDE) -> None:
        self.sde = sde
        alpha, sigma = sde.levels(
            torch.tensor([sde.end, sde.smallest], dtype=torch.float64, device="cpu")
        )
        self.first, self.last = (alpha / sigma).log().tolist()

    def time(self, position: Tensor) -> Tensor:
        """The time of the process at a position, which is lambda."""
        return self.sde.time_at(torch.exp(-position)).clamp(self.sde.smallest, self.sde.end)

    def clock(self, position: Tensor, h: Tensor) -> Tensor:
        """The increase of the signal-to-noise ratio in a step of h, the Brownian path's time."""
        return torch.exp(2 * position) * torch.expm1(2 * h)

    def begin(self, x: Tensor, score: Score) -> State:
        """The state before the first step: D at the first position, and a slope of 0."""
        clean = prediction_fn(score, "x0", self.sde)(x, self.time(_filled(x, self.first)))
        return clean, torch.zeros_like(clean)

    def attempt(
        self, x: Tensor, state: State, start: Tensor, stop: Tensor, noise: Tensor, score: Score
    ) -> Attempt:
        """A step of images x [M, ...] from positions ``start`` to ``stop``, float64 [M].

        ``noise`` [M, ...] are the Brownian path's increments.
        """
        clean, slope = state
        h = stop - start
        alpha_t, sigma_t = self.sde.levels_at(torch.exp(-start))
        alpha_s, sigma_s = self.sde.levels_at(torch.exp(-stop))
        psi_s = sigma_s**2 / alpha_s
        share = -torch.expm1(-2 * h)
        of_change = beside(alpha_s * (1 - share / (2 * h)), x)
        change = beside(h, x) * slope
        predicted = (
            beside(psi_s * alpha_t / sigma_t**2, x) * x
            + beside(alpha_s * share, x) * clean
            + of_change * change
            + beside(psi_s, x) * noise
        )
        next_clean = prediction_fn(score, "x0", self.sde)(predicted, self.time(stop))
        actual_change = next_clean - clean
        corrected = predicted + of_change * (actual_change - change)
        return Attempt(predicted, corrected, (next_clean, actual_change / beside(h, x)))

    def denoised(self, x: Tensor, state: State, score: Score) -> Tensor:
        """The mean of x_0 given x at the end, D of the last step."""
        return state[0]


SCHEMES: dict[str, Callable[[SDE], Exponential | ImprovedEuler]] = {
    "exponential": Exponential,
    "improved-euler": ImprovedEuler,
}


def _filled(x: Tensor, position: float) -> Tensor:
    """One position for all images x, float64 [M]."""
    return torch.full((len(x),), position, dtype=torch.float64, device="cpu")
