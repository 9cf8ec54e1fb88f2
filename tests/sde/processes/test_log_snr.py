"""Processes of a log-SNR: levels, rates, inverses, labels, and a log-SNR that is learned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastdiff
from fastdiff import Diffusion, samplers
from fastdiff.losses.score_matching import denoising_score_matching, diffusion_loss
from fastdiff.sde import CosineLogSNR, LearnedLogSNR, LinearLogSNR, discretize, score_fn

PROCESSES = [
    pytest.param(LinearLogSNR(), id="linear"),
    pytest.param(CosineLogSNR(), id="cosine"),
    pytest.param(CosineLogSNR(12.0, -9.0, shift=-2.5), id="shifted"),
    pytest.param(LearnedLogSNR(9.0, -7.0, hidden=16), id="learned"),
]
VARIANCE = 0.3  # of Gaussian data


def times(count: int = 33) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


@pytest.mark.parametrize("sde", PROCESSES)
def test_rates_follow_from_levels(sde) -> None:
    """f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2, by automatic differentiation."""
    t = times().requires_grad_()
    alpha, sigma = sde.levels(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    (alpha_rate,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
    (power_rate,) = torch.autograd.grad((sigma**2).sum(), t)
    f, squared = (rate.detach() for rate in sde.rates(t.detach()))
    torch.testing.assert_close(f, alpha_rate / alpha.detach(), rtol=1e-9, atol=1e-12)
    wanted = power_rate - 2 * f * sigma.detach() ** 2
    torch.testing.assert_close(squared, wanted, rtol=1e-9, atol=1e-12)
    assert bool((squared > 0).all())


@pytest.mark.parametrize("sde", PROCESSES)
def test_times_are_found_again(sde) -> None:
    alpha, sigma = (level.detach() for level in sde.levels(times()))
    torch.testing.assert_close(sde.time_at(sigma / alpha), times(), rtol=1e-9, atol=1e-9)
    again = sde.levels_at(sigma / alpha)
    torch.testing.assert_close(torch.stack(again), torch.stack([alpha, sigma]))


@pytest.mark.parametrize("sde", PROCESSES)
def test_a_label_is_the_log_snr_between_its_ends(sde) -> None:
    ends = sde.log_snr(times(2)).detach()
    log_snr = torch.lerp(ends[0], ends[1], times())
    torch.testing.assert_close(sde.label(sde.time_of(log_snr)).detach(), 999 * times())


def test_published_values() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert LinearLogSNR().log_snr(t).tolist() == pytest.approx([13.3, 4.15, -5.0])
    assert CosineLogSNR().log_snr(t).tolist() == pytest.approx([15.0, 0.0, -15.0], abs=1e-9)
    wide = CosineLogSNR(60.0, -60.0)  # limits so far away that the angle is pi t / 2
    alpha, _ = wide.levels(t[1:2] / 3)
    assert alpha.item() == pytest.approx(math.cos(math.pi / 12), rel=1e-9)
    shifted = CosineLogSNR(shift=2 * math.log(64 / 256))
    torch.testing.assert_close(shifted.log_snr(t), CosineLogSNR().log_snr(t) - 4 * math.log(2))


def exact(x: Tensor, label: Tensor, sde) -> Tensor:
    """The noise that is expected in x_t of Gaussian data, known by the label alone."""
    first, last = sde.log_snr(times(2)).detach().tolist()
    log_snr = (first + label.double() / 999 * (last - first))[:, None]
    signal, noise = log_snr.sigmoid(), (-log_snr).sigmoid()
    return (noise.sqrt() / (signal * VARIANCE + noise) * x).to(x.dtype)


@pytest.mark.parametrize("sde", PROCESSES)
@pytest.mark.parametrize("method", ["dpmpp-2m", "ode"])
def test_samples_are_those_of_the_data(sde, method: str) -> None:
    """The ODE keeps quantiles: noise of one deviation becomes data of one deviation."""
    diffusion = Diffusion(lambda x, t: exact(x, t, sde), sde)
    x_T = torch.tensor([[1.0], [-1.0]])
    sampler = diffusion.sampler(method, None if method == "ode" else 60)
    images = diffusion.generate(sampler, (2, 1), x_T=x_T, progress=False).images
    ratio = math.sqrt(math.exp(sde.log_snr(times(2))[1].item()) * VARIANCE + 1)
    # The prior of deviation 1 stands for a marginal of deviation sigma ratio.
    wanted = math.sqrt(VARIANCE) / (sde.levels(times(2))[1][1].item() * ratio)
    assert images.flatten().tolist() == pytest.approx([wanted, -wanted], rel=3e-3)


@pytest.mark.parametrize("sde", PROCESSES)
def test_likelihoods_are_those_of_the_data(sde) -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, -0.7]], dtype=torch.float64)
    diffusion = Diffusion(lambda x, t: exact(x, t, sde), sde)
    found = diffusion.log_likelihood(x, trace="exact", progress=False, rtol=1e-6, atol=1e-6).logp
    normal = torch.distributions.Normal(0.0, math.sqrt(VARIANCE))
    # What the prior is short of the marginal at the end is below 0.01 nats.
    torch.testing.assert_close(found, normal.log_prob(x).sum(1), rtol=0, atol=0.02)


@pytest.mark.parametrize("sde", PROCESSES)
def test_the_loss_is_that_of_score_matching_weighted_for_likelihood(sde, generator) -> None:
    x0, noise = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    t = times(9)
    network = lambda x, label: 0.3 * x  # noqa: E731
    score = score_fn(network, "eps", sde)
    wanted = denoising_score_matching(score, sde, x0, t, noise, weighting="likelihood") / 2
    found = diffusion_loss(network, sde, x0, t, noise)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_log_snr_is_learned_that_gives_the_least_variance() -> None:
    """For Gaussian data of one value the loss is -l' e z^2 / 2 with z normal and e the least error,
    v snr / (1 + v snr). The mean of its square is least where -l' e is the same at every t, that is
    where log(1 + v snr) falls along a straight line."""
    torch.manual_seed(0)
    sde, count = LearnedLogSNR(5.0, -2.0, hidden=24), 1024
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    optimizer = torch.optim.Adam(sde.network.parameters(), lr=0.05)

    def losses() -> Tensor:
        x0, noise = torch.randn(2, count, 1, dtype=torch.float64)
        model = lambda x, label: exact(x, label, sde)  # noqa: E731
        return diffusion_loss(model, sde, math.sqrt(VARIANCE) * x0, t, noise)

    def unevenness() -> float:
        bent = functional.softplus(sde.log_snr(times()) + math.log(VARIANCE)).detach()
        return ((bent - torch.lerp(bent[0], bent[-1], times())).abs().max() / bent[0]).item()

    before, mean = unevenness(), losses().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        losses().square().mean().backward()
        optimizer.step()
    assert before > 0.25
    assert unevenness() < 0.08
    assert losses().mean().item() == pytest.approx(mean, rel=0.15)  # the bound is the same


def test_a_network_serves_any_process_with_the_same_ends() -> None:
    """Its label is the log-SNR: the linear process samples what the cosine trained."""
    cosine = CosineLogSNR(9.0, -9.0)
    path = discretize(LinearLogSNR(9.0, -9.0))
    sampler = samplers.make("dpmpp-2m", path, 40)
    model, _ = fastdiff.sde.on_path(lambda x, t: exact(x, t, cosine), "eps", path)
    image = fastdiff.sample(model, sampler, (1, 1), x_T=torch.ones(1, 1), progress=False)
    assert image.item() == pytest.approx(math.sqrt(VARIANCE), rel=3e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearLogSNR(1.0, 1.0), "finite log_snr_max > log_snr_min, got 1.0 and"),
        (lambda: CosineLogSNR(math.inf), "got inf and"),
        (lambda: CosineLogSNR(shift=math.nan), "shift must be finite, got nan"),
        (lambda: LearnedLogSNR(hidden=0), "hidden must be at least 1, got 0"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
