"""Inverse problems: gradients against closed forms, and samples that follow the posterior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import guidance, process, samplers, schedules, sde

SCHEDULE = schedules.cosine(200)
MASK = torch.ones(1, 1, 4, 4)
MASK[..., :2] = 0
OPERATORS = {
    "grey": guidance.grey(),
    "pixels": guidance.pixels(MASK),
    "smaller": guidance.smaller(2),
}
S2 = 0.6  # variance of the data


def exact(kind: str = "eps"):
    """The best prediction for data N(0, S2)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (
            table[t].view(-1, 1, 1, 1) for table in (SCHEDULE.alpha_t, SCHEDULE.sigma_t)
        )
        score = -x / (alpha**2 * S2 + sigma**2)
        a, b = (part[t].view(-1, 1, 1, 1) for part in process.conversion(SCHEDULE, "score", kind))
        return a * x + b * score

    return predict


def matrix(measured: guidance.Measured) -> Tensor:
    """The operator on flat images of 3x4x4 values, [M, 48]."""
    unit = torch.eye(48, dtype=torch.float64).view(48, 3, 4, 4)
    return measured.apply(unit).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_are_orthogonal_and_of_the_length_that_is_said(name: str) -> None:
    found = matrix(OPERATORS[name])
    product = found @ found.T
    used = product.diagonal() > 0  # the pixels that are not measured have no row
    wanted = OPERATORS[name].gain * torch.eye(int(used.sum()), dtype=torch.float64)
    torch.testing.assert_close(product[used][:, used], wanted)


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_guided_score_is_that_of_the_posterior(name: str, kind: str, generator) -> None:
    """Of Gaussian data: x_t given y is Gaussian, with mean alpha K y and a covariance of rank M."""
    measured, noise = OPERATORS[name], 0.4
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = measured.apply(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64))
    t = torch.tensor([20, 150])
    guided = guidance.pseudoinverse_guided(
        exact(kind), measured, y, SCHEDULE, kind=kind, noise=noise, data_std=math.sqrt(S2)
    )
    found = process.to_score(SCHEDULE, x, t, guided(x, t), kind)
    a = matrix(measured)
    inverse = torch.linalg.inv(S2 * a @ a.T + noise**2 * torch.eye(len(a), dtype=a.dtype))
    gain = S2 * a.T @ inverse
    covariance = S2 * (torch.eye(48, dtype=a.dtype) - gain @ a)
    for i, step in enumerate(t.tolist()):
        alpha, sigma = SCHEDULE.alpha_t[step], SCHEDULE.sigma_t[step]
        mean = alpha * gain @ y[i].flatten()
        spread = alpha**2 * covariance + sigma**2 * torch.eye(48, dtype=a.dtype)
        wanted = -torch.linalg.solve(spread, x[i].flatten() - mean)
        torch.testing.assert_close(found[i].flatten(), wanted, rtol=1e-9, atol=1e-9)


def test_samples_have_the_posteriors_mean() -> None:
    """The ODE takes the mean of the noise to the mean of the images."""
    measured, y = guidance.grey(), torch.full((1, 1, 2, 2), 0.9, dtype=torch.float64)
    sampler = samplers.make("dpmpp-2m", SCHEDULE, 60, clip=None)
    guided = guidance.pseudoinverse_guided(
        exact(), measured, y, SCHEDULE, noise=0.2, data_std=math.sqrt(S2)
    )
    x_T = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    image = fastdiff.sample(guided, sampler, (1, 3, 2, 2), x_T=x_T, progress=False)
    mean = S2 / 3 / (S2 / 3 + 0.04) * 0.9
    torch.testing.assert_close(image, torch.full_like(image, mean), rtol=2e-2, atol=0)


def test_the_score_of_a_solver_is_guided_too() -> None:
    measured, y = guidance.grey(), torch.full((1, 1, 2, 2), 0.9, dtype=torch.float64)
    vp = sde.VP()

    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in vp.levels(t))
        return -x / (alpha**2 * S2 + sigma**2)

    guided = guidance.pseudoinverse_guided(
        score, measured, y, vp, kind="score", noise=0.2, data_std=math.sqrt(S2)
    )
    x_T = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    image = sde.solve_ode(guided, vp, x_T, rtol=1e-6, atol=1e-6, progress=False).x
    mean = S2 / 3 / (S2 / 3 + 0.04) * 0.9
    torch.testing.assert_close(image, torch.full_like(image, mean), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_posterior_sampling_moves_a_step_by_the_gradient(name: str, generator) -> None:
    measured = guidance.smaller(2)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = measured.apply(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64))
    sampler = samplers.make(name, SCHEDULE, 5, clip=None)
    guided = guidance.posterior_sampling(exact(), measured, y, sampler, scale=0.7)
    t, row = sampler.table.timesteps[2].long().expand(2), torch.tensor(2)
    free = x.clone().requires_grad_()
    x0 = process.to_x0(SCHEDULE, free, t, exact()(free, t))
    distance = (y - measured.apply(x0)).flatten(1).norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(distance, free)
    moved, plain = (
        fastdiff.ops.sampler_step(x, f(x, t), None, torch.zeros_like(x), sampler.table.values, row)
        for f in (guided, exact())
    )
    torch.testing.assert_close(moved - plain, -0.7 * gradient)


def test_posterior_sampling_fits_what_was_measured() -> None:
    measured, y = guidance.grey(), torch.linspace(-1, 1, 16).view(1, 1, 4, 4).double()
    sampler = samplers.make("ddpm", SCHEDULE, 50, clip=None)
    guided = guidance.posterior_sampling(exact(), measured, y, sampler, scale=0.5)
    shape = (1, 3, 4, 4)
    plain, found = (
        fastdiff.sample(f, sampler, shape, seed=3, dtype=torch.float64, progress=False)
        for f in (exact(), guided)
    )
    off = [(measured.apply(image) - y).norm().item() for image in (plain, found)]
    assert off[1] < 0.2 * off[0]


Y = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: guidance.posterior_sampling(
                exact(), guidance.grey(), Y, samplers.make("ddim", SCHEDULE, 5)
            ),
            "clip=None",
        ),
        (
            lambda: guidance.posterior_sampling(
                exact(), guidance.grey(), Y, samplers.make("dpmpp-2m", SCHEDULE, 5, clip=None)
            ),
            "dpmpp-2m keeps values between steps",
        ),
        (
            lambda: guidance.pseudoinverse_guided(
                exact(), guidance.grey(), Y, SCHEDULE, noise=-1.0
            ),
            "wanted noise >= 0",
        ),
        (
            lambda: guidance.pseudoinverse_guided(exact(), guidance.smaller(2), Y, SCHEDULE)(
                torch.zeros(1, 3, 4, 4), torch.tensor([5])
            ),
            r"y must have shape \(1, 3, 2, 2\), got \(1, 1, 4, 4\)",
        ),
    ],
)
def test_refusals(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
