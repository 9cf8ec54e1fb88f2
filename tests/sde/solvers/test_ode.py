"""The probability-flow ODE against its solution for Gaussian data, and there and back."""

from __future__ import annotations

import pytest
import torch

from fastdiff.sde import EDM, VE, VP, Straight, SubVP
from fastdiff.sde.solvers.ode import solve_ode

pytestmark = pytest.mark.usefixtures("one_thread")
PROCESSES = pytest.mark.parametrize(
    "sde", [VP(), SubVP(), VE(), EDM(), Straight()], ids=lambda s: repr(s)[:3]
)
MEAN = torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64)
STD = torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)


def at(sde, t):
    """Mean [N, 3] and standard deviation of the marginal of Gaussian data."""
    alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
    return alpha * MEAN, ((alpha * STD) ** 2 + sigma**2).sqrt()


def gaussian(sde):
    def score(x, t):
        mean, std = at(sde, t)
        return (-(x - mean) / std**2).to(x.dtype)

    return score


def mixture(sde, means=(-0.6, 0.6), std=0.1):
    """Two equal Gaussians in every coordinate."""

    def score(x, t):
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        variance = (alpha * std) ** 2 + sigma**2
        centres = alpha[..., None] * torch.tensor(means, dtype=torch.float64)
        apart = x[..., None] - centres
        weights = torch.softmax(-(apart**2) / (2 * variance[..., None]), -1)
        return -(weights * apart).sum(-1) / variance

    return score


@PROCESSES
@pytest.mark.parametrize("backward", [True, False], ids=["to images", "to noise"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_gaussian_map(sde, backward, method, generator):
    """The flow of Gaussian data keeps (x - mean(t)) / std(t)."""
    ends = torch.tensor([sde.end, sde.smallest], dtype=torch.float64)
    means, stds = at(sde, ends if backward else ends.flip(0))
    unit = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    for tolerance in (1e-4, 1e-6):
        found = solve_ode(
            gaussian(sde), sde, means[0] + stds[0] * unit, backward=backward,
            rtol=tolerance, atol=tolerance, method=method,
        )  # fmt: skip
        # Going to noise, an early error grows as the deviation does.
        growth = max(1.0, (stds[1] / stds[0]).max().item())
        error = (found.x - (means[1] + stds[1] * unit)).abs().max()
        assert error <= 20 * growth * tolerance
    assert bool((found.evaluations > 0).all())


@PROCESSES
def test_mixture_there_and_back(sde, generator):
    images = 0.6 * torch.randn(6, 2, generator=generator, dtype=torch.float64).sign()
    images += 0.1 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    score = mixture(sde)
    noise = solve_ode(score, sde, images, backward=False, rtol=1e-9, atol=1e-9)
    assert (noise.x / sde.prior_std).abs().max() < 5
    back = solve_ode(score, sde, noise.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.x, images, rtol=0, atol=1e-5)


def test_flow_sends_the_prior_to_the_mixture(generator):
    """In one dimension it is monotone: quantiles go to quantiles."""
    sde = VP(beta_max=60.0)  # its marginal at the end is the prior to 1e-6
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    x = solve_ode(mixture(sde), sde, normal.icdf(levels)[:, None], rtol=1e-8, atol=1e-8).x
    alpha, sigma = sde.levels(torch.tensor(sde.smallest, dtype=torch.float64))
    std = ((alpha * 0.1) ** 2 + sigma**2).sqrt()
    reached = (normal.cdf((x - 0.6 * alpha) / std) + normal.cdf((x + 0.6 * alpha) / std)) / 2
    torch.testing.assert_close(reached.flatten(), levels, rtol=0, atol=1e-5)


def test_conditions_follow_the_images_that_are_left():
    """Each image has data of its own spread, and its own number of steps."""
    sde = VP()
    spread = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    left = set()

    def score(x, t, index):
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        left.add(tuple(index.tolist()))
        return -x / ((alpha * spread[index, None]) ** 2 + sigma**2)

    x = torch.ones(3, 2, dtype=torch.float64)
    found = solve_ode(score, sde, x, conditioned=True, rtol=1e-6, atol=1e-6)
    ends = torch.tensor([sde.end, sde.smallest], dtype=torch.float64)
    alpha, sigma = (level[:, None] for level in sde.levels(ends))
    std = ((alpha * spread) ** 2 + sigma**2).sqrt()
    wanted = (std[1] / std[0])[:, None].expand(3, 2)
    torch.testing.assert_close(found.x, wanted, rtol=0, atol=1e-5)
    assert len(left) > 1
    assert found.evaluations[0] < found.evaluations[2]


def test_images_keep_their_dtype_and_shape(generator):
    sde = VP()

    def score(x, t):
        assert x.dtype == torch.bfloat16
        return -x

    x = torch.randn(2, 3, 4, 4, generator=generator).bfloat16()
    found = solve_ode(score, sde, x, rtol=1e-3, atol=1e-3)
    assert found.x.dtype == torch.bfloat16
    # The flow of standard normal data stands still.
    torch.testing.assert_close(found.x, x, rtol=2**-7, atol=2e-3)


def test_refusals():
    sde, x = VP(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="unknown method 'heun'"):
        solve_ode(gaussian(sde), sde, x, method="heun")
    with pytest.raises(FloatingPointError, match="sample 0 is not finite at t = 1"):
        solve_ode(lambda x, t: x / 0, sde, x)
    with pytest.raises(RuntimeError, match=r"sample 0 .*used up max_evaluations"):
        solve_ode(gaussian(sde), sde, x + 1, max_evaluations=10)
