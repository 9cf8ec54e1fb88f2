"""Score matching against Gaussian data, whose score is known."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff
from fastdiff.losses.score_matching import (
    denoising_score_matching,
    edm_loss,
    geometric_sigmas,
    log_normal_sigma,
    ncsn_loss,
    sliced_score_matching,
)
from fastdiff.sde import EDM, VE, VP, SubVP

PROCESSES = {"vp": VP(), "subvp": SubVP(), "ve": VE(), "edm": EDM()}
VARIANCE = 0.25


def gaussian(sde):
    """The score of N(0, VARIANCE) at time t."""

    def score(x, t):
        alpha, sigma = sde.levels(t.double())
        return -x / (alpha**2 * VARIANCE + sigma**2).view(-1, 1).to(x.dtype)

    return score


def data(generator, images=20_000, size=4):
    x0 = VARIANCE**0.5 * torch.randn(images, size, generator=generator, dtype=torch.float64)
    return x0, torch.randn(images, size, generator=generator, dtype=torch.float64)


def mean_and_error(losses):
    return losses.mean().item(), losses.std().item() / len(losses) ** 0.5


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("weighting", ["sigma", "likelihood"])
def test_the_true_score_has_the_loss_that_theory_says(name, share, weighting, generator) -> None:
    """E|sigma s + eps|^2 is alpha^2 v / (alpha^2 v + sigma^2): what of eps nobody can know."""
    sde = PROCESSES[name]
    x0, noise = data(generator)
    t = torch.full((len(x0),), share * sde.end, dtype=torch.float64)
    losses = denoising_score_matching(gaussian(sde), sde, x0, t, noise, weighting=weighting)
    (alpha, sigma), (_, squared) = (of(t[:1]) for of in (sde.levels, sde.rates))
    wanted = alpha**2 * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    if weighting == "likelihood":
        wanted = wanted * squared / sigma**2
    mean, error = mean_and_error(losses)
    assert abs(mean - wanted.item()) < 4 * error


def test_the_true_score_is_the_minimum(generator) -> None:
    sde = PROCESSES["vp"]
    x0, noise = data(generator)
    t = torch.rand(len(x0), generator=generator, dtype=torch.float64)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    true = gaussian(sde)
    with fastdiff.backend("reference"):  # for a second derivative
        loss = denoising_score_matching(lambda x, t: factor * true(x, t), sde, x0, t, noise).mean()
        (slope,) = torch.autograd.grad(loss, factor, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, factor)
    assert abs(slope.item() / curvature.item()) < 0.01


def test_edms_target_has_variance_one_and_the_best_network_its_loss(generator) -> None:
    sde = EDM(sigma_data=VARIANCE**0.5)
    x0, noise = data(generator)
    for level in (0.01, 0.5, 20.0):
        sigma = torch.full((len(x0),), level, dtype=torch.float64)
        target = edm_loss(lambda x, label: torch.zeros_like(x), sde, x0, sigma, noise)
        mean, error = mean_and_error(target)
        # For Gaussian data of that deviation the best F is 0: c_skip x is the denoiser.
        assert abs(mean - 1) < 4 * error


def test_edms_network_sees_scaled_images_and_its_label(generator) -> None:
    sde, seen = EDM(), {}

    def model(x, label, shift):
        seen.update(x=x, label=label, shift=shift)
        return x

    x0, noise = data(generator, 5)
    sigma = torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    losses = edm_loss(model, sde, x0, sigma, noise, shift=3)
    level = sigma.view(-1, 1)
    noisy = x0 + level * noise
    torch.testing.assert_close(seen["x"], noisy / (level**2 + 0.25).sqrt())
    torch.testing.assert_close(seen["label"], sigma.log() / 4)
    assert seen["shift"] == 3
    denoised = 0.25 / (level**2 + 0.25) * noisy + level * 0.5 / (level**2 + 0.25).sqrt() * seen["x"]
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(losses, weight * (denoised - x0).square().mean(1))


def test_log_normal_levels(generator) -> None:
    drawn = log_normal_sigma(20_000, generator=generator).log()
    assert drawn.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / 20_000**0.5)
    assert drawn.std().item() == pytest.approx(1.2, abs=0.03)


def test_ncsn_with_the_true_score(generator) -> None:
    x0, noise = data(generator)
    sigma = torch.full((len(x0),), 0.7, dtype=torch.float64)
    losses = ncsn_loss(lambda x, s: -x / (VARIANCE + s.view(-1, 1) ** 2), x0, sigma, noise)
    mean, error = mean_and_error(losses)
    assert abs(mean - 0.5 * VARIANCE / (VARIANCE + 0.49)) < 4 * error


def test_geometric_levels() -> None:
    sigmas = geometric_sigmas(10.0, 0.1, 5)
    torch.testing.assert_close(sigmas, torch.tensor([10, 10**0.5, 1, 10**-0.5, 0.1]).double())
    for wrong in ((1.0, 2.0, 5), (1.0, 0.0, 5), (2.0, 1.0, 1)):
        with pytest.raises(ValueError, match="largest > smallest > 0"):
            geometric_sigmas(*wrong)


@pytest.mark.parametrize("probes", [1, 3])
def test_sliced_score_matching_is_exact_for_a_diagonal_curvature(probes, generator) -> None:
    """For s = -a x the curvature is -a whatever the direction: -a + a^2 |x|^2 / 2."""
    x, _ = data(generator, 6)
    losses = sliced_score_matching(lambda x: -3 * x, x, probes=probes, generator=generator)
    torch.testing.assert_close(losses, -3 + 4.5 * x.square().mean(1))


def test_sliced_score_matching_finds_the_precision(generator) -> None:
    """Minimised over s = -A x by the inverse of the covariance."""
    mix = torch.tensor([[1.0, 0.5], [0.0, 0.8]], dtype=torch.float64)
    x = torch.randn(50_000, 2, generator=generator, dtype=torch.float64) @ mix.T
    precision = torch.linalg.inv(x.T @ x / len(x)).requires_grad_()
    losses = sliced_score_matching(lambda x: -x @ precision, x, probes=4, generator=generator)
    (slope,) = torch.autograd.grad(losses.mean(), precision)
    assert slope.abs().max() < 0.02
    off = sliced_score_matching(lambda x: -1.2 * x @ precision, x, probes=4, generator=generator)
    assert off.mean() > losses.mean() + 0.01


def test_gradients_in_float64() -> None:
    sde = VP()
    x0, noise = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def losses(weight):
        return (
            denoising_score_matching(lambda x, t: torch.tanh(x @ weight), sde, x0, t, noise),
            ncsn_loss(lambda x, s: torch.tanh(x @ weight), x0, t, noise),
            edm_loss(lambda x, label: torch.tanh(x @ weight), EDM(), x0, t, noise),
        )

    assert torch.autograd.gradcheck(losses, weight)


def test_bad_input_is_refused(generator) -> None:
    x0, noise = data(generator, 4)
    t = torch.full((4,), 0.5)
    score = gaussian(PROCESSES["vp"])
    with pytest.raises(ValueError, match="unknown weighting 'snr', wanted one of sigma, like"):
        denoising_score_matching(score, VP(), x0, t, noise, weighting="snr")
    with pytest.raises(ValueError, match=r"noise must have the shape of x0, \(4, 4\)"):
        denoising_score_matching(score, VP(), x0, t, noise[1:])
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.1"):
        denoising_score_matching(score, VP(), x0, 3 * t, noise)
    with pytest.raises(ValueError, match="sigma must be positive"):
        ncsn_loss(score, x0, -t, noise)
    with pytest.raises(ValueError, match="probes must be at least 1"):
        sliced_score_matching(lambda x: x, x0, probes=0)
    assert math.isfinite(sliced_score_matching(lambda x: x, x0).sum().item())
