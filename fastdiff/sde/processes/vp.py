"""The variance-preserving and the sub-VP SDE (Song et al. 2021, arXiv:2011.13456)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.sde.processes.linear_sde import TrainedFromEarlier


class VP(TrainedFromEarlier):
    """The variance-preserving SDE, the continuous limit of DDPM (Song et al. 2021, eq. 11 and 33).

    Args:
        beta_min: beta(0).
        beta_max: beta(1); beta increases linearly with t.
        smallest: the time at which sampling stops; None is 1e-3, as in the paper's code.
        trained_from: the smallest time of training and likelihoods; None is 1e-5, as in the paper's
            code, or ``smallest`` if that is less.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or not 0 < trained_from <= smallest < 1.
    """

    default_smallest = 1e-3

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        smallest: float | None = None,
        trained_from: float | None = None,
    ) -> None:
        super().__init__(smallest, trained_from)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"wanted 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(beta_min={self.beta_min}, beta_max={self.beta_max}"
            f"{self.changed_times()})"
        )

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = -beta / 2 and g^2 = beta."""
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta, beta

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, and sigma = sqrt(1 - alpha^2)."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha^2 + sigma^2 = 1."""
        alpha = 1 / torch.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which -log alpha = log(1 + ratio^2) / 2, the root of a quadratic."""
        return self._time_of(torch.log1p(ratio**2) / 2)

    def label(self, t: Tensor) -> Tensor:
        """999 t: time embeddings of networks are made for 1000 timesteps."""
        return 999 * t

    def _time_of(self, lost: Tensor) -> Tensor:
        """The time at which -log alpha is ``lost``, without cancellation near 0."""
        half = self.beta_min / 2
        return 2 * lost / (half + (half**2 + (self.beta_max - self.beta_min) * lost).sqrt())

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min


class SubVP(VP):
    """The sub-variance-preserving SDE (Song et al. 2021, eq. 12 and 29), with less noise than VP.

    The arguments are those of :class:`VP`.
    """

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f = -beta / 2 and g^2 = beta (1 - alpha^4)."""
        f, beta = super().rates(t)
        return f, -beta * torch.expm1(4 * self._log_alpha(t))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, and sigma = 1 - alpha^2, which is not the root that VP takes."""
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def levels_at(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma with alpha^2 + sigma = 1."""
        alpha = torch.exp(-torch.asinh(ratio / 2))
        return alpha, ratio * alpha

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time at which 1 / alpha - alpha = ratio, so that -log alpha = asinh(ratio / 2)."""
        return self._time_of(torch.asinh(ratio / 2))
