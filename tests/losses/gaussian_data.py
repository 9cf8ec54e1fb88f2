"""Gaussian data x_0 ~ N(m, s^2): the best model and every term of its bound, in closed form.

Expectations over x_0 and the noise are sums over the nodes of a quadrature, exact for the terms of
the bound, which are quadratic in both. The nodes stand for images [9, 1, 1, 1] of one pixel.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fastdiff import NoiseSchedule, losses

LN2 = math.log(2)


class GaussianData:
    """N(mean, std^2)."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std
        z, weight = np.polynomial.hermite_e.hermegauss(3)
        z, weight = torch.from_numpy(z), torch.from_numpy(weight / weight.sum())
        self.x0 = (mean + std * z).repeat_interleave(3).view(9, 1, 1, 1)
        self.noise = z.repeat(3).view(9, 1, 1, 1)
        self._weight = torch.outer(weight, weight).flatten()

    def expectation(self, values):
        """Of a function's values at the nodes."""
        return self._weight @ values

    @property
    def entropy(self):
        """E[-log p(x_0)] in nats."""
        return (1 + math.log(2 * math.pi * self.std**2)) / 2

    def mmse(self, schedule):
        """The variance of x_0 given x_t, [T]."""
        alpha, sigma = schedule.alpha_t, schedule.sigma_t
        return (self.std * sigma) ** 2 / ((self.std * alpha) ** 2 + sigma**2)

    def best_x0(self, schedule, x_t, t):
        """E[x_0 | x_t]."""
        alpha, sigma = (
            table[t].view(-1, 1, 1, 1) for table in (schedule.alpha_t, schedule.sigma_t)
        )
        gain = alpha * self.std**2 / ((self.std * alpha) ** 2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def model(self, schedule, log_variance=None):
        """The best prediction of x_0, followed by a log-variance [T] if one is given."""

        def model(x_t, t):
            x0 = self.best_x0(schedule, x_t, t)
            if log_variance is None:
                return x0
            return torch.cat([x0, log_variance[t].view(-1, 1, 1, 1).expand_as(x0)], dim=1)

        return model

    def step_variance(self, schedule):
        """The variance of x_{t-1} given x_t, and of x_0 given x_t at t = 0, [T]."""
        uncertain = schedule.posterior_mean_coef_x0**2 * self.mmse(schedule)
        return schedule.posterior_variance + uncertain

    def prior_divergence(self, schedule):
        """KL(q(x_T) || N(0, 1)) in nats."""
        abar = schedule.alphas_cumprod[-1].item()
        change = abar * (self.std**2 - 1)
        return (change - math.log1p(change) + abar * self.mean**2) / 2

    def terms(self, schedule, variance="fixed_small", log_variance=None):
        """E[L_t] of the best model in nats by quadrature, [T], with x_0's density at t = 0."""
        steps = schedule.num_timesteps
        t = torch.arange(steps).repeat_interleave(9)  # all timesteps in one call
        value = losses.vlb_loss(
            schedule, self.model(schedule, log_variance), self.x0.repeat(steps, 1, 1, 1), t,
            self.noise.repeat(steps, 1, 1, 1), kind="x0", variance=variance, discrete=False,
        )  # fmt: skip
        return value.view(steps, 9) @ self._weight * LN2

    def prior(self, schedule):
        """E[L_T] in nats by quadrature."""
        return self.expectation(losses.prior_term(schedule, self.x0, unit="nats")).item()


def even_log_snr(num_timesteps, first=8.0, last=-16.0):
    """A schedule whose log-SNR falls from ``first`` to ``last`` in equal steps."""
    abar = torch.linspace(first, last, num_timesteps, dtype=torch.float64).sigmoid()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return NoiseSchedule(1 - abar / previous)
