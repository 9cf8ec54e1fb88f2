"""Samplers on data that is Gaussian, where everything has a closed form.

For x_0 ~ N(mu, s^2), x_t is Gaussian and the best prediction of x_0 from it is linear in it, so a
run of a sampler is an affine map of x_T and of the noise, and the error of a run can be computed
without sampling.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff import process, sample, schedules
from fastdiff.samplers import COLUMNS, DDIM, DDPM

T, MEAN, STD = 1000, 0.4, 0.5
SCHEDULE = schedules.linear(T)
CONVERT = {
    "eps": process.to_eps,
    "x0": process.to_x0,
    "v": process.to_v,
    "score": process.to_score,
}


def exact_model(schedule, mean, std, kind):
    """The best prediction of ``kind`` given x_t, as a function of (x_t, t)."""

    def model(x, t):
        t = torch.as_tensor(t).reshape(-1).expand(len(x))
        abar = schedule.alphas_cumprod[t].view(-1, *[1] * (x.ndim - 1))
        variance = abar * std**2 + 1 - abar
        x0 = mean + abar.sqrt() * std**2 / variance * (x - abar.sqrt() * mean)
        return CONVERT[kind](schedule, x, t, x0, "x0")

    return model


def final_moments(sampler, schedule, mean, std):
    """Mean and variance of the samples, carried through the table from x_T ~ N(0, 1)."""
    at, variance = 0.0, 1.0
    for t, row in zip(sampler.timesteps.tolist(), sampler.table.tolist(), strict=True):
        c = dict(zip(COLUMNS, row, strict=True))
        abar = schedule.alphas_cumprod[t].item()
        # eps of the best prediction is e0 + e1 x.
        total = abar * std**2 + 1 - abar
        e1 = math.sqrt(1 - abar) / total
        e0 = -e1 * math.sqrt(abar) * mean
        slope = c["out_x"] + c["out_x0"] * (c["x0_x"] + c["x0_m"] * e1) + c["out_m"] * e1
        shift = c["out_x0"] * c["x0_m"] * e0 + c["out_m"] * e0
        at = slope * at + shift
        variance = slope**2 * variance + c["noise"] ** 2 * math.exp(c["logvar"])
    return at, variance


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_converges_at_first_order(spacing):
    """The error of the probability flow falls as 1 / steps (arXiv:2010.02502, section 4.3)."""
    steps = [25, 50, 100, 200]
    errors = []
    for n in steps:
        sampler = DDIM(SCHEDULE, n, clip=None, spacing=spacing)
        _, variance = final_moments(sampler, SCHEDULE, MEAN, STD)
        errors.append(abs(math.sqrt(variance) - STD))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.8 < order < 1.3, errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids="eta={}".format)
def test_ddim_reaches_the_right_moments(eta):
    sampler = DDIM(SCHEDULE, T, eta=eta, clip=None)
    mean, variance = final_moments(sampler, SCHEDULE, MEAN, STD)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(STD, abs=0.005)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_reaches_the_right_moments(variance):
    sampler = DDPM(SCHEDULE, variance=variance, clip=None)
    mean, got = final_moments(sampler, SCHEDULE, MEAN, STD)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert math.sqrt(got) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("steps", [1, 5, 50], ids="{} steps".format)
def test_the_large_variance_is_exact_for_unit_gaussians(steps):
    """DDPM, section 3.2: beta is the best variance for x_0 ~ N(0, 1). All but the last step, which
    adds none, keep the variance at 1."""
    sampler = DDPM(SCHEDULE, steps, variance="fixed_large", clip=None, spacing="trailing")
    table = sampler.table[:, [COLUMNS.index(c) for c in ("noise", "logvar")]]
    _, variance = final_moments(sampler, SCHEDULE, 0.0, 1.0)
    beta = SCHEDULE.respaced(sampler.timesteps.flip(0)).betas[0].item()
    assert table[-1, 0] == 0
    assert table[-1, 1].exp().item() == pytest.approx(beta)
    assert variance == pytest.approx(1 - beta, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 50], ids="{} steps".format)
def test_the_small_variance_is_exact_for_a_point(steps):
    """DDPM, section 3.2: beta_tilde is the best variance for x_0 at one point."""
    sampler = DDPM(SCHEDULE, steps, variance="fixed_small", clip=None)
    mean, variance = final_moments(sampler, SCHEDULE, MEAN, 0.0)
    assert mean == pytest.approx(MEAN, rel=1e-12)
    assert variance < 1e-20


@pytest.mark.parametrize("kind", process.KINDS)
def test_samples_have_the_computed_moments(kind, generator):
    """The loop itself, in float64, for each kind of prediction: within five standard errors."""
    count = 20_000
    sampler = DDPM(SCHEDULE, 20, prediction=kind, clip=None, spacing="leading")
    drawn = sample(
        exact_model(SCHEDULE, MEAN, STD, kind),
        sampler,
        (count, 1),
        generator=generator,
        dtype=torch.float64,
        progress=False,
    )
    by_eps = DDPM(SCHEDULE, 20, clip=None, spacing="leading")
    mean, variance = final_moments(by_eps, SCHEDULE, MEAN, STD)
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert drawn.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("kind", ["x0", "v", "score"])
def test_ddim_is_the_same_for_every_kind_of_prediction(kind):
    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64).view(-1, 1)
    runs = [
        sample(
            exact_model(SCHEDULE, MEAN, STD, k),
            DDIM(SCHEDULE, 20, prediction=k, clip=None),
            x_T.shape,
            x_T=x_T,
            progress=False,
        )
        for k in ("eps", kind)
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


def test_ddim_follows_the_probability_flow():
    """With small steps, x_T at a quantile of its distribution goes to that quantile of x_0's."""
    start = SCHEDULE.alphas_cumprod[-1].item()
    mean_T, std_T = math.sqrt(start) * MEAN, math.sqrt(start * STD**2 + 1 - start)
    quantiles = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    end = sample(
        exact_model(SCHEDULE, MEAN, STD, "eps"),
        DDIM(SCHEDULE, T, clip=None),
        quantiles.shape,
        x_T=mean_T + std_T * quantiles,
        progress=False,
    )
    torch.testing.assert_close(end, MEAN + STD * quantiles, rtol=0, atol=0.01)
