"""The process of EDM, sigma(t) = t (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.sde.processes.linear_sde import SDE, check_sigmas


class EDM(SDE):
    """x_t = x_0 + t eps: the time is the standard deviation of the noise (Karras et al. 2022).

    arXiv:2206.00364, table 1 (column "ours") and section 5.

    Args:
        sigma_min: the level at which sampling stops.
        sigma_max: the level at which sampling begins.
        sigma_data: standard deviation of the images, for the preconditioning.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or sigma_data not positive.
    """

    extends = True  # algorithm 2 evaluates the network beyond sigma_max

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5
    ) -> None:
        check_sigmas(sigma_min, sigma_max)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data
        self.smallest, self.end = sigma_min, sigma_max

    def __repr__(self) -> str:
        return f"EDM(sigma_min={self.smallest}, sigma_max={self.end}, sigma_data={self.sigma_data})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = 0 and g^2 = 2 t."""
        return torch.zeros_like(t), 2 * t

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 and sigma = t."""
        return torch.ones_like(t), t

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 and sigma = ratio."""
        return torch.ones_like(ratio), ratio

    def time_at(self, ratio: Tensor) -> Tensor:
        """The ratio itself."""
        return ratio

    def label(self, t: Tensor) -> Tensor:
        """log(t) / 4, c_noise of the preconditioning."""
        return t.log() / 4

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in of D(x, t) = c_skip x + c_out F(c_in x, label) (eq. 7).

        They give the network's input and target variance 1 at every t, and amplify errors of F the
        least.
        """
        variance = t**2 + self.sigma_data**2
        return (
            self.sigma_data**2 / variance,
            t * self.sigma_data / variance.sqrt(),
            1 / variance.sqrt(),
        )

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.end
