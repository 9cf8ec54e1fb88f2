"""Divergence of Gaussians, and probabilities of 8-bit values."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from fastdiff import losses
from fastdiff.losses.discretized_gaussian import normal_log_density

LEVELS = -1 + 2 * torch.arange(256, dtype=torch.float64) / 255


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def test_divergence_is_that_of_torch_distributions(generator):
    a, b, c, d = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    found = losses.normal_kl(a, b, c, d)
    given = torch.distributions.Normal(a, torch.exp(b / 2))
    other = torch.distributions.Normal(c, torch.exp(d / 2))
    wanted = torch.distributions.kl_divergence(given, other)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_divergence_of_nearly_equal_variances_keeps_its_digits():
    """gap^2 / 4: 2.5e-9 in float32, whose numbers near 1 are 6e-8 apart."""
    gap = torch.tensor([-1e-4, 1e-4])
    zero = torch.zeros(2)
    found = losses.normal_kl(zero, zero, zero, gap)
    torch.testing.assert_close(found, gap**2 / 4, rtol=2e-3, atol=0)
    assert not losses.normal_kl(gap, gap, gap, gap).any()


def test_density_is_that_of_scipy(generator):
    x, mean, log_variance = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    wanted = norm.logpdf(x, mean, torch.exp(log_variance / 2))
    found = normal_log_density(x, mean, log_variance)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.3, 4.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.0, 0.301, 1.0, 2.0])
def test_probabilities_of_all_levels_add_up_to_one(mean, std):
    log_variance = scalar(2 * math.log(std))
    found = losses.discretized_gaussian_log_likelihood(LEVELS, scalar(mean), log_variance).exp()
    # Up to 256 probabilities are raised to 1e-12.
    assert found.sum().item() == pytest.approx(1, abs=2.6e-10)
    assert found.min() >= 0.999e-12


@pytest.mark.parametrize("std", [0.004, 0.05, 0.7])
@pytest.mark.parametrize("mean", [-0.98, 0.1, 1.02])
def test_probabilities_are_areas_open_at_the_edges(mean, std):
    found = losses.discretized_gaussian_log_likelihood(
        LEVELS, scalar(mean), scalar(2 * math.log(std))
    )
    edges = (LEVELS[:-1] + LEVELS[1:]) / 2
    bounds = torch.cat([scalar([-math.inf]), edges, scalar([math.inf])])
    # On the upper side of the mean the areas are taken of upper tails, as exact as the lower ones.
    lower, upper = norm.cdf(bounds, mean, std), norm.sf(bounds, mean, std)
    below = (bounds[:-1] < mean).numpy()
    area = torch.from_numpy(below * (lower[1:] - lower[:-1]) + ~below * (upper[:-1] - upper[1:]))
    torch.testing.assert_close(found, area.clamp(min=1e-12).log(), rtol=1e-9, atol=1e-12)


def test_float32_keeps_its_digits_far_from_the_mean():
    """Six standard deviations above the mean, where 1 - 1e-9 is 1 in float32."""
    mean, log_variance = torch.zeros(()), torch.tensor(2 * math.log(0.16))
    x = LEVELS[[0, 51, 204, 255]].float()
    found = losses.discretized_gaussian_log_likelihood(x, mean, log_variance)
    wide = losses.discretized_gaussian_log_likelihood(
        x.double(), mean.double(), log_variance.double()
    )
    assert found.dtype == torch.float32
    assert wide[3] < -20
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)


def test_probabilities_are_held_above_1e_12():
    mean = scalar(-1.0).requires_grad_()
    found = losses.discretized_gaussian_log_likelihood(LEVELS[255], mean, scalar(-8.0))
    assert found.item() == pytest.approx(math.log(1e-12))
    found.backward()
    assert mean.grad == 0


def test_a_wide_gaussian_is_its_density_times_the_width_of_a_bin():
    x, mean, log_variance = LEVELS[1:-1], scalar(0.2), scalar(2 * math.log(3.0))
    found = losses.discretized_gaussian_log_likelihood(x, mean, log_variance)
    wanted = normal_log_density(x, mean, log_variance) + math.log(2 / 255)
    # The middle of a bin stands for it but for width^2 / 24 times the density's curvature.
    torch.testing.assert_close(found, wanted, rtol=0, atol=(2 / 255) ** 2 / 24 / 9 * 1.01)


def test_gradients(generator):
    x = LEVELS[[0, 3, 100, 128, 254, 255]]
    mean = (x + 0.05 * torch.randn(6, generator=generator, dtype=torch.float64)).requires_grad_()
    log_variance = torch.linspace(-6, -1, 6, dtype=torch.float64).requires_grad_()

    def likelihood(mean, log_variance):
        return losses.discretized_gaussian_log_likelihood(x, mean, log_variance)

    assert torch.autograd.gradcheck(likelihood, (mean, log_variance))
    others = [value.detach() + 0.3 for value in (mean, log_variance)]
    assert torch.autograd.gradcheck(losses.normal_kl, (mean, log_variance, *others))
    assert torch.autograd.gradcheck(losses.normal_kl, (*others, mean, log_variance))
