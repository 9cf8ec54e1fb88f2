"""The variance-exploding SDE (Song et al. 2021, arXiv:2011.13456)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.sde.processes.linear_sde import TrainedFromEarlier, check_sigmas


class VE(TrainedFromEarlier):
    """The variance-exploding SDE, the continuous limit of NCSN (Song et al. 2021, eq. 9 and 30).

    Args:
        sigma_min: sigma(0).
        sigma_max: sigma(1); sigma increases geometrically with t.
        smallest: the time at which sampling stops; None is 1e-5, as in the paper's code.
        trained_from: the smallest time of training and likelihoods; None is 1e-5, as in the paper's
            code, or ``smallest`` if that is less.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or not 0 < trained_from <= smallest < 1.
    """

    default_smallest = 1e-5

    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        *,
        smallest: float | None = None,
        trained_from: float | None = None,
    ) -> None:
        super().__init__(smallest, trained_from)
        check_sigmas(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __repr__(self) -> str:
        return f"VE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}{self.changed_times()})"

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = 0 and g^2 = 2 sigma^2 log(sigma_max / sigma_min)."""
        _, sigma = self.levels(t)
        return torch.zeros_like(sigma), sigma**2 * (2 * math.log(self.sigma_max / self.sigma_min))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 and sigma = sigma_min (sigma_max / sigma_min)^t."""
        sigma = self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))
        return torch.ones_like(sigma), sigma

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = 1 and sigma = ratio."""
        return torch.ones_like(ratio), ratio

    def time_at(self, ratio: Tensor) -> Tensor:
        """log(ratio / sigma_min) / log(sigma_max / sigma_min)."""
        return (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def label(self, t: Tensor) -> Tensor:
        """999 t, in which log sigma(t) is linear."""
        return 999 * t

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.sigma_max
