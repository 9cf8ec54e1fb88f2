"""Steps of the reverse-time SDE that tell their own error, for ``fastdiff.sde.solve_adaptive``.

A scheme moves images along a position that rises, by steps of h, and needs a Brownian path whose
time, the clock, may be another. It knows where images begin and end, how large steps may be, and
how their error grows with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.common.checks import beside
from fastdiff.sde.processes import SDE
from fastdiff.sde.score import prediction_fn

Ask = Callable[[Tensor, Tensor], Tensor]  # the score at images and times
State = tuple[Tensor, ...]  # what a scheme keeps of each image from step to step, [M, ...]


@dataclass(frozen=True)
class Attempt:
    """A step that may be kept.

    Attributes:
        low: the images it leads to, in the lower order.
        high: the same in the higher order, which are kept; the difference is the error.
        state: what the next step needs if this one is good.
    """

    low: Tensor
    high: Tensor
    state: State


class ImprovedEuler:
    """Euler-Maruyama and the stochastic improved Euler method with the same noise.

    Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, algorithm 1: two evaluations a step, which
    moves in t.
    """

    cost = 2
    eps_rel = 0.05
    safety, exponent, growth = 0.9, 0.9, float("inf")  # theta and r of the paper

    def __init__(self, sde: SDE) -> None:
        self.sde = sde
        self.first, self.last = -sde.end, -sde.smallest
        self.h_init, self.h_max = sde.end / 100, float("inf")

    def time(self, position: Tensor) -> Tensor:
        """The process's time."""
        return -position

    def clock(self, position: Tensor, h: Tensor) -> Tensor:
        """How far the Brownian path goes in a step of h."""
        return h

    def begin(self, x: Tensor, ask: Ask) -> State:
        """What the first step needs."""
        return ()

    def attempt(
        self, x: Tensor, state: State, start: Tensor, stop: Tensor, noise: Tensor, ask: Ask
    ) -> Attempt:
        """Images [M, ...] at positions ``stop``, with Brownian increments ``noise``."""
        h, times = stop - start, (self.time(start), self.time(stop))
        euler = x + self._moved(x, times[0], h, noise, ask)
        improved = (euler + x + self._moved(euler, times[1], h, noise, ask)) / 2
        return Attempt(euler, improved, ())

    def denoised(self, x: Tensor, state: State, ask: Ask) -> Tensor:
        """The mean of x_0 given images at the end (Tweedie's formula), in one more evaluation."""
        return prediction_fn(ask, "x0", self.sde)(x, self.time(_filled(x, self.last)))

    def _moved(self, x: Tensor, t: Tensor, h: Tensor, noise: Tensor, ask: Ask) -> Tensor:
        f, squared = self.sde.rates(t)
        return (
            beside(h * squared, x) * ask(x, t)
            - beside(h * f, x) * x
            + beside(squared.sqrt(), x) * noise
        )


class Exponential:
    """The exact solution but for the clean image D(x_t, t), which is taken to be linear in lambda.

    With lambda = log(alpha / sigma) and h its change from t to s, the reverse-time SDE is solved by

        x_s = A x_t + alpha_s int_0^h 2 e^{2 (u - h)} D du + sigma_s sqrt(1 - e^{-2h}) z,
        A = psi_s / psi_t,   psi = sigma^2 / alpha

    (SDE-DPM-Solver++, Lu et al. 2022, arXiv:2211.01095, section 5), for every linear SDE. D is
    extrapolated along its last change (two-step Adams-Bashforth), evaluated at the images so
    predicted, and interpolated to correct them, where the evaluation is not repeated: it serves the
    next step, as in UniPC (Zhao et al. 2023, arXiv:2302.04867). So a step, also a rejected one,
    takes one evaluation; prediction and correction are the pair that tells the error. The noise of
    a step is psi_s times the increment of a Brownian path whose time is the signal-to-noise ratio
    e^{2 lambda}, so that shorter steps can share it.
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
        """The process's time."""
        return self.sde.time_at(torch.exp(-position)).clamp(self.sde.smallest, self.sde.end)

    def clock(self, position: Tensor, h: Tensor) -> Tensor:
        """By how much a step of h raises the signal-to-noise ratio."""
        return torch.exp(2 * position) * torch.expm1(2 * h)

    def begin(self, x: Tensor, ask: Ask) -> State:
        """D, and no slope of it yet."""
        clean = prediction_fn(ask, "x0", self.sde)(x, self.time(_filled(x, self.first)))
        return clean, torch.zeros_like(clean)

    def attempt(
        self, x: Tensor, state: State, start: Tensor, stop: Tensor, noise: Tensor, ask: Ask
    ) -> Attempt:
        """Images [M, ...] at positions ``stop``, with Brownian increments ``noise``."""
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
        found = prediction_fn(ask, "x0", self.sde)(predicted, self.time(stop))
        changed = found - clean
        corrected = predicted + of_change * (changed - change)
        return Attempt(predicted, corrected, (found, changed / beside(h, x)))

    def denoised(self, x: Tensor, state: State, ask: Ask) -> Tensor:
        """D at the end."""
        return state[0]


SCHEMES: dict[str, Callable[[SDE], Exponential | ImprovedEuler]] = {
    "exponential": Exponential,
    "improved-euler": ImprovedEuler,
}


def _filled(x: Tensor, position: float) -> Tensor:
    return torch.full((len(x),), position, dtype=torch.float64, device="cpu")
