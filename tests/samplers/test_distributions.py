"""What stochastic samplers draw has the right distribution, within the sampling error.

The model is the best one for a mixture of Gaussians and x_T has its true distribution, so what a
run draws should be the mixture at the last level. Steps are so many that the bias, which
test_gaussian and test_order measure without noise, is below the sampling error. Means, covariances
and weights must lie within four standard errors (1 in 16,000 by chance, for each), and the
Kolmogorov-Smirnov test must not see a difference at one in a thousand. Seeds are fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import Gaussian, lcm_boundary, three_clouds, two_bumps
from scipy.stats import kstest

from fastdiff import sample, samplers, schedules
from fastdiff.samplers.grids import point_at_time

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = schedules.linear()
BETWEEN = {"grid": "logsnr", "sigma_min": 0.05, "sigma_max": 10.0, "final": "sigma_min"}
COUNT = 5000
ERRORS = 4  # standard errors

STOCHASTIC = {
    "ddpm": ("ddpm", 400, {"clip": None}),
    "ddpm, large variance": ("ddpm", 400, {"clip": None, "variance": "fixed_large"}),
    "ddim, eta=1": ("ddim", 400, {"clip": None, "eta": 1.0}),
    "ddim, eta=0.5": ("ddim", 400, {"clip": None, "eta": 0.5}),
    "euler-ancestral": ("euler-ancestral", 400, {}),
    "euler, churned": ("euler", 400, {"s_churn": 50.0}),
    "heun, churned": ("heun", 100, {"s_churn": 20.0}),
    "kdpm-2, churned": ("kdpm-2", 100, {"s_churn": 20.0}),
    "dpm-2-ancestral": ("dpm-2-ancestral", 400, {}),
    "dpm-fast, eta=1": ("dpm-fast", 200, {"eta": 1.0}),
    "dpmpp-2s-ancestral": ("dpmpp-2s-ancestral", 400, {}),
    "dpmpp-sde": ("dpmpp-sde", 50, {}),
    "dpmpp-2m-sde": ("dpmpp-2m-sde", 100, {}),
    "dpmpp-2m-sde, heun": ("dpmpp-2m-sde", 100, {"solver_type": "heun"}),
    "dpmpp-3m-sde": ("dpmpp-3m-sde", 100, {}),
}


def draws(sampler, data, model, *, draw=0, **noise):
    """Images of a run that begins with the true x_T, and their level."""
    levels = sampler.table.levels
    generator = torch.Generator().manual_seed(draw)
    noise = noise or {"generator": generator}
    x_T = data.draw(COUNT, generator, *levels[0].tolist()) / sampler.table.init_noise_sigma
    found = sample(model, sampler, tuple(x_T.shape), x_T=x_T, progress=False, **noise)
    return found, levels[-1].tolist()


def assert_moments(found, data, level):
    """Mean and covariance within standard errors taken from the sample itself."""
    root = math.sqrt(len(found))
    mean, covariance = data.mean(level[0]), data.covariance(*level)
    deviations = found - mean
    products = deviations[:, :, None] * deviations[:, None, :]
    for values, wanted in ((found, mean), (products, covariance)):
        error = (values.mean(0) - wanted).abs() / (values.std(0) / root)
        assert error.max() < ERRORS, error


@pytest.mark.parametrize("case", STOCHASTIC)
def test_draws_are_the_mixtures(case):
    """One dimension: moments, weights of the components, and the whole distribution."""
    name, steps, options = STOCHASTIC[case]
    data = two_bumps()
    sampler = samplers.make(name, LINEAR, steps, **BETWEEN, **options)
    assert sampler.table.needs_noise
    found, level = draws(sampler, data, data.model(LINEAR))
    assert_moments(found, data, level)
    left = (found < -0.35).double().mean().item()  # between both components
    wanted = data.cdf(-0.35, *level)
    assert left == pytest.approx(wanted, abs=ERRORS * math.sqrt(wanted * (1 - wanted) / COUNT))
    assert kstest(found[:, 0].numpy(), lambda x: data.cdf(x, *level)).pvalue > 1e-3


@pytest.mark.parametrize("case", ["ddpm", "heun, churned", "dpmpp-sde", "dpmpp-2m-sde"])
def test_draws_have_the_right_moments_in_two_dimensions(case):
    name, steps, options = STOCHASTIC[case]
    data = three_clouds(2)
    sampler = samplers.make(name, LINEAR, steps, **BETWEEN, **options)
    found, level = draws(sampler, data, data.model(LINEAR))
    assert_moments(found, data, level)


@pytest.mark.parametrize("case", ["ddim, eta=1", "dpmpp-sde"])
def test_draws_are_the_mixtures_on_the_straight_path(case):
    """The flow schedule, and a model of eps - x_0."""
    name, steps, options = STOCHASTIC[case]
    path, data = schedules.flow(), two_bumps()
    sampler = samplers.make(name, path, steps, prediction="flow", **BETWEEN, **options)
    found, level = draws(sampler, data, data.model(path, "flow"), draw=1)
    assert_moments(found, data, level)
    assert kstest(found[:, 0].numpy(), lambda x: data.cdf(x, *level)).pvalue > 1e-3


def test_draws_from_counted_noise_are_the_mixtures():
    name, steps, options = STOCHASTIC["dpmpp-2m-sde"]
    data = two_bumps()
    sampler = samplers.make(name, LINEAR, steps, **BETWEEN, **options)
    found, level = draws(sampler, data, data.model(LINEAR), seed=3)
    assert_moments(found, data, level)
    assert kstest(found[:, 0].numpy(), lambda x: data.cdf(x, *level)).pvalue > 1e-3


def test_a_full_ddpm_run_from_pure_noise_draws_the_mixture():
    """As it is used: all T steps from N(0, 1) to zero noise."""
    data = two_bumps()
    sampler = samplers.make("ddpm", LINEAR, 1000, clip=None)
    found = sample(
        data.model(LINEAR),
        sampler,
        (COUNT, 1),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert_moments(found, data, (1.0, 0.0))
    assert kstest(found[:, 0].numpy(), data.cdf).pvalue > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4], ids="{} steps".format)
@pytest.mark.parametrize("name", ["consistency", "lcm"])
def test_exact_jumps_draw_the_data(name, steps):
    """A Gaussian's consistency function is the map that keeps quantiles: every jump is exact, so
    one step is enough."""
    data = Gaussian(0.4, 0.5)
    if name == "consistency":
        sampler = samplers.make(name, LINEAR, steps, grid="karras", sigma_max=10.0)
        to, boundary = point_at_time(LINEAR, 0).ratio, None
    else:
        sampler = samplers.make(name, LINEAR, steps, prediction="x0")
        to, boundary = 0.0, lcm_boundary
    found, _ = draws(sampler, data, data.jump(LINEAR, to, boundary))
    level = (1.0, to)  # the consistency function ends at the schedule's first level, not scaled
    assert_moments(found, data, level)
    assert kstest(found[:, 0].numpy(), lambda x: data.cdf(x, *level)).pvalue > 1e-3


@pytest.mark.parametrize("wrong", ["noise", "mean"])
def test_a_wrong_run_is_seen(wrong):
    """The same checks refuse a run with a fifth more noise, or a model that is off by a tenth."""
    data = two_bumps()
    options = {"s_noise": 1.2} if wrong == "noise" else {}
    model = data.model(LINEAR)
    sampler = samplers.make("dpmpp-2m-sde", LINEAR, 100, **BETWEEN, **options)
    off = 0.1 if wrong == "mean" else 0.0
    found, level = draws(sampler, data, lambda x, t: model(x, t) + off)
    assert kstest(found[:, 0].numpy(), lambda x: data.cdf(x, *level)).pvalue < 1e-3
    with pytest.raises(AssertionError):
        assert_moments(found, data, level)
