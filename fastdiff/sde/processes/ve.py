"""The variance-exploding SDE (Song et al. 2021, arXiv:2011.13456)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.common.inputs import check_choice
from fastdiff.sde.processes.linear_sde import TrainedFromEarlier, check_sigmas

LABELS = ("time", "sigma", "log-sigma")  # choices for ``label_by`` of VE


class VE(TrainedFromEarlier):
    """The variance-exploding SDE, the continuous limit of NCSN (Song et al. 2021, eq. 9 and 30).

    Args:
        sigma_min: sigma(0).
        sigma_max: sigma(1); sigma increases geometrically with t.
        smallest: the time at which sampling stops; None is 1e-5, as in the paper's code.
        trained_from: the smallest time of training and likelihoods; None is 1e-5, as in the paper's
            code, or ``smallest`` if that is less.
        label_by: what the network is told: "time" is 999 t; "sigma" is sigma itself, as the paper's
            NCSN++ is, whose Fourier features take its logarithm and whose output is divided by
            it, so that it predicts the score (section H.2; ``time_embedding_type="fourier"`` of
            ``UNet2DModel``); "log-sigma" is its logarithm.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or not 0 < trained_from <= smallest < 1, or an
            unknown ``label_by``.
    """

    default_smallest = 1e-5

    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        *,
        smallest: float | None = None,
        trained_from: float | None = None,
        label_by: str = "time",
    ) -> None:
        super().__init__(smallest, trained_from)
        check_sigmas(sigma_min, sigma_max)
        check_choice("label_by", label_by, LABELS)
        self.sigma_min, self.sigma_max, self.label_by = sigma_min, sigma_max, label_by

    def __repr__(self) -> str:
        label = "" if self.label_by == "time" else f", label_by={self.label_by!r}"
        return (
            f"VE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}{self.changed_times()}"
            f"{label})"
        )

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
        """999 t, in which log sigma(t) is linear; or what ``label_by`` says."""
        if self.label_by == "time":
            return 999 * t
        _, sigma = self.levels(t)
        return sigma if self.label_by == "sigma" else sigma.log()

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.sigma_max
