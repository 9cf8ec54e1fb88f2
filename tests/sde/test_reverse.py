"""The reverse-time SDE and the probability-flow ODE against Gaussian closed forms, in float64."""

from __future__ import annotations

import pytest
import torch

from fastdiff import schedules
from fastdiff.common.checks import beside
from fastdiff.sde import (
    EDM,
    VE,
    VP,
    Interpolated,
    Reverse,
    Straight,
    SubVP,
    probability_flow,
    reverse,
)

MEAN, SPREAD = 0.4, 0.7  # images are N(MEAN, SPREAD^2) in every pixel
SDES = [
    pytest.param(VP(), id="vp"),
    pytest.param(SubVP(), id="sub-vp"),
    pytest.param(VE(), id="ve"),
    pytest.param(EDM(), id="edm"),
    pytest.param(Straight(), id="straight"),
    pytest.param(Interpolated(schedules.cosine(50)), id="cosine"),
]


def marginal(sde, t):
    """Mean and standard deviation of x_t, shaped like t."""
    alpha, sigma = sde.levels(t)
    return alpha * MEAN, (alpha**2 * SPREAD**2 + sigma**2).sqrt()


def score_of(sde):
    def score(x, t):
        mean, deviation = (beside(value, x) for value in marginal(sde, t))
        return -(x - mean) / deviation**2

    return score


@pytest.mark.parametrize("sde", SDES)
def test_drift_and_diffusion_are_the_formula(sde, generator):
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    t = sde.end * torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)
    (f, squared), score = sde.rates(t), score_of(sde)
    for noise, share in ((1.0, 1.0), (0.0, 0.5), (0.6, 0.68)):
        back = Reverse(sde, score, noise)
        drift, scores = back.drift(x, t), score(x, t)
        for n in range(3):
            wanted = f[n].item() * x[n] - share * squared[n].item() * scores[n]
            torch.testing.assert_close(drift[n], wanted)
        torch.testing.assert_close(back.diffusion(t), noise * squared.sqrt())
    assert reverse(sde, score) == Reverse(sde, score, 1.0)
    assert probability_flow(sde, score) == Reverse(sde, score, 0.0)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8, 1.0])
def test_every_share_of_noise_has_the_same_marginals(noise, sde):
    """Backwards in time, the moments of x_t obey dm/dt = a m + b and dv/dt = 2 a v - noise^2 g^2.

    The drift is a x + b; the left sides are derivatives of the forward process's marginals.
    """
    share = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = (sde.smallest + (sde.end - sde.smallest) * share).requires_grad_()
    mean, deviation = marginal(sde, t)
    constant = 0 * t.sum()
    (mean_rate,) = torch.autograd.grad(mean.sum() + constant, t, retain_graph=True)
    (variance_rate,) = torch.autograd.grad((deviation**2).sum(), t)
    t, mean, deviation = t.detach(), mean.detach(), deviation.detach()

    back = Reverse(sde, score_of(sde), noise)
    drift = back.drift(mean[:, None], t)[:, 0]
    slope = (back.drift((mean + deviation)[:, None], t)[:, 0] - drift) / deviation
    torch.testing.assert_close(drift, mean_rate, rtol=1e-10, atol=1e-12)
    found = 2 * slope * deviation**2 - back.diffusion(t) ** 2
    torch.testing.assert_close(found, variance_rate, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sde", SDES)
def test_probability_flow_transports_a_gaussian(sde):
    """It keeps (x_t - mean_t) / deviation_t; Heun's third-order method, which never asks at its
    step's end, so that the corners of an interpolated schedule do no harm."""
    first, last = sde.end, sde.smallest
    power = 7 if isinstance(sde, EDM) else 1
    grid = torch.linspace(first ** (1 / power), last ** (1 / power), 1961, dtype=torch.float64)
    flow, ends = probability_flow(sde, score_of(sde)), torch.tensor([first, last]).double()
    (mean_T, mean_0), (deviation_T, deviation_0) = marginal(sde, ends)
    standard = torch.tensor([[-2.0, 0.0, 1.5]], dtype=torch.float64)

    x = mean_T + deviation_T * standard
    for t, s in (grid**power).clamp(last, first).unfold(0, 2, 1):
        h = s - t
        k1 = flow.drift(x, t)
        k2 = flow.drift(x + h / 3 * k1, t + h / 3)
        k3 = flow.drift(x + 2 * h / 3 * k2, t + 2 * h / 3)
        x = x + h / 4 * (k1 + 3 * k3)
    torch.testing.assert_close(x, mean_0 + deviation_0 * standard, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_one_time_for_all(dtype, generator):
    x = torch.randn(3, 4, generator=generator).to(dtype)
    t = torch.tensor(0.5)
    seen = []

    def score(x, t):
        seen.append(t)
        return -x

    found = reverse(VP(), score).drift(x, t)
    assert found.dtype == dtype
    assert seen[0].dtype == torch.float64
    assert seen[0].tolist() == [0.5] * 3
    wanted = (-10.05 / 2 + 10.05) * x.double()
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_out_of_range(noise):
    with pytest.raises(ValueError, match=rf"noise must lie in 0\.\.1, got {noise}"):
        Reverse(VP(), score_of(VP()), noise)


def test_refusals():
    back, x = reverse(VP(), score_of(VP())), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        back.drift(x, torch.tensor([0.5, 2.0]))
    with pytest.raises(ValueError, match=r"\[\] or \[2\]"):
        back.drift(x, torch.zeros(3))
    with pytest.raises(TypeError, match="got float"):
        back.drift(x, 0.5)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        back.diffusion(torch.tensor(-1.0))
