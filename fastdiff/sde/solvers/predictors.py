"""Predictors: one step back in time, x_s = a x_t + b score(x_t, t) + c z with s < t.

Each method returns a, b and c for all steps of a grid, float64, so that one loop runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdiff.sde.processes import SDE

Coefficients = tuple[Tensor, Tensor, Tensor]  # a, b and c, each [S]


@dataclass(frozen=True)
class Steps:
    """The S steps of a time grid, each from a time t to the next time s < t.

    Attributes:
        sde: the forward process.
        times: S + 1 decreasing times, float64 on the CPU.
    """

    sde: SDE
    times: Tensor

    @cached_property
    def length(self) -> Tensor:
        """t - s, [S]."""
        return -self.times.diff()

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma at all the times, [S + 1]."""
        return self.sde.levels(self.times)

    @cached_property
    def rates(self) -> tuple[Tensor, Tensor]:
        """f and g^2 at the start t of each step, [S]."""
        return self.sde.rates(self.times[:-1])

    @cached_property
    def signal_kept(self) -> Tensor:
        """alpha_t / alpha_s, the factor of x_s in x_t in the forward process, [S]."""
        alpha, _ = self.levels
        return alpha[:-1] / alpha[1:]

    @cached_property
    def variance_added(self) -> Tensor:
        """Variance of the noise that the forward process adds between s and t, [S]."""
        _, sigma = self.levels
        return sigma[:-1] ** 2 - (self.signal_kept * sigma[1:]) ** 2


def euler_maruyama(steps: Steps) -> Coefficients:
    """Euler-Maruyama for the reverse-time SDE (Song et al. 2021, arXiv:2011.13456, eq. 6)."""
    f, squared = steps.rates
    return 1 - f * steps.length, squared * steps.length, (squared * steps.length).sqrt()


def probability_flow(steps: Steps) -> Coefficients:
    """Euler's method for the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, eq. 13)."""
    f, squared = steps.rates
    return 1 - f * steps.length, squared * steps.length / 2, torch.zeros_like(f)


def reverse_diffusion(steps: Steps) -> Coefficients:
    """The reverse SDE, discretised like the forward one (Song et al. 2021, eq. 46).

    In the paper x_i = x_{i+1} - f + G^2 score + G z, for the forward chain x_{i+1} = x_i + f(x_i) +
    G z_i. Here the chain is the SDE's exact transition, f = (signal_kept - 1) x and
    G^2 = variance_added, which is DDPM's chain for VP and SMLD's for VE.
    """
    return 2 - steps.signal_kept, steps.variance_added, steps.variance_added.sqrt()


def ancestral(steps: Steps) -> Coefficients:
    """The posterior of x_s given x_t and the x_0 that the score implies.

    Song et al. 2021, arXiv:2011.13456, eq. 4 (VP) and appendix F (VE), for any alpha and sigma. The
    noise has the posterior's exact variance, of which eq. 4 has the upper bound beta.
    """
    _, sigma = steps.levels
    std = steps.variance_added.sqrt() * sigma[1:] / sigma[:-1]
    return 1 / steps.signal_kept, steps.variance_added / steps.signal_kept, std


METHODS: dict[str, Callable[[Steps], Coefficients]] = {
    "euler-maruyama": euler_maruyama,
    "reverse-diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "probability-flow": probability_flow,
}
