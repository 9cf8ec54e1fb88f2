"""Densities of the log-SNR, log(alpha^2 / sigma^2), at which networks are trained.

A density of the log-SNR says where training spends its time, whatever the process calls time there
(Kingma & Gao 2023, arXiv:2303.00848; Hang et al. 2024, arXiv:2407.03297).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Density(Protocol):
    """A density on the real line, by its distribution function and the inverse."""

    def cumulative(self, value: Tensor) -> Tensor:
        """The probability of less than ``value``, float64, shaped like it."""

    def quantile(self, share: Tensor) -> Tensor:
        """The value below which there is a ``share`` of the probability, 0..1; float64."""


@dataclass(frozen=True)
class Laplace:
    """exp(-|l - mean| / scale) / (2 scale) (Hang et al. 2024, arXiv:2407.03297, table 1).

    The paper's values are the defaults: training close to the noise level at which signal and noise
    are equal.

    Raises:
        ValueError: a mean that is not finite, or a scale that is not positive.
    """

    mean: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        _check(self.mean, self.scale)

    def cumulative(self, value: Tensor) -> Tensor:
        """exp(z) / 2 below the mean and 1 - exp(-z) / 2 above, z = (l - mean) / scale."""
        z = (value - self.mean) / self.scale
        tail = torch.exp(-z.abs()) / 2
        return torch.where(z < 0, tail, 1 - tail)

    def quantile(self, share: Tensor) -> Tensor:
        """mean + scale log(2 share) below the mean, mean - scale log(2 - 2 share) above."""
        z = torch.where(share < 0.5, (2 * share).log(), -(2 - 2 * share).log())
        return self.mean + self.scale * z


@dataclass(frozen=True)
class Cosh:
    """1 / (pi scale cosh((l - mean) / scale)), the density of the cosine schedule.

    With the default scale of 2 and uniform t it is that of alpha = cos(pi t / 2) (Kingma & Gao
    2023, arXiv:2303.00848, table 1); a mean of 2 log(64 / side) is the shift of simple diffusion.

    Raises:
        ValueError: a mean that is not finite, or a scale that is not positive.
    """

    mean: float = 0.0
    scale: float = 2.0

    def __post_init__(self) -> None:
        _check(self.mean, self.scale)

    def cumulative(self, value: Tensor) -> Tensor:
        """(2 / pi) atan(exp((l - mean) / scale))."""
        return torch.atan(torch.exp((value - self.mean) / self.scale)) * (2 / math.pi)

    def quantile(self, share: Tensor) -> Tensor:
        """mean + scale log tan(pi share / 2)."""
        return self.mean + self.scale * torch.tan(share * (math.pi / 2)).log()


def _check(mean: float, scale: float) -> None:
    if not math.isfinite(mean):
        raise ValueError(f"mean must be finite, got {mean}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale}")
