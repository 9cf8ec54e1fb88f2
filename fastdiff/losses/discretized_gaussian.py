"""The KL divergence of two Gaussians and the likelihood of 8-bit values under one, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 256  # levels of an 8-bit image, spread evenly over [-1, 1]


def normal_kl(
    mean: Tensor, log_variance: Tensor, mean_of: Tensor, log_variance_of: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(mean_of, variance_of)) of each element, in nats.

    Args:
        mean: mean of the first Gaussian, over which the expectation is taken, any shape.
        log_variance: its log-variance.
        mean_of: mean of the second Gaussian; all four arguments broadcast.
        log_variance_of: its log-variance.
    """
    gap = log_variance_of - log_variance
    # For nearly equal variances the divergence is gap^2 / 4: exp(-gap) - 1 would lose its digits.
    spread = torch.expm1(-gap) + gap
    return (spread + (mean - mean_of) ** 2 * torch.exp(-log_variance_of)) / 2


def normal_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, variance) of each element, in nats."""
    return -((x - mean) ** 2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of each 8-bit value under a Gaussian, in nats (DDPM eq. 13).

    A value stands for the bin of half-width 1/255 around it. The bins of the lowest and highest
    level (beyond +-0.999) reach to infinity, so that the 256 probabilities add up to 1 (Ho et al.
    2020, arXiv:2006.11239, section 3.3). Probabilities are clamped to at least 1e-12, as in the
    authors' code; a clamped probability has no gradient.

    Args:
        x: values in [-1, 1], -1 + 2 k / 255 for the level k, float32 or float64.
        mean: mean of the Gaussian, broadcast against x.
        log_variance: log-variance of the Gaussian, broadcast against x.

    Returns:
        float32 or float64, of the broadcast shape.
    """
    centred = x - mean
    scale = torch.exp(-log_variance / 2)
    half = 1 / (BINS - 1)
    above, below = scale * (centred + half), scale * (centred - half)
    # A bin is as probable as its mirror image about the mean; below the mean the difference of the
    # two distribution functions loses no digits.
    near = -centred.abs()
    inside = _normal_cdf(scale * (near + half)) - _normal_cdf(scale * (near - half))
    probability = torch.where(
        x < -0.999, _normal_cdf(above), torch.where(x > 0.999, _normal_cdf(-below), inside)
    )
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The normal distribution function by erfc: far below 0, 1 + erf would lose all digits."""
    return torch.special.erfc(-z * math.sqrt(0.5)) / 2
