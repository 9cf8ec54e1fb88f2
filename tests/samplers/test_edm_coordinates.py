"""Steps that are straight in other times and scalings: the sampler of EDM's ablations.

Karras et al. 2022, arXiv:2206.00364, table 1, eq. 4 and algorithm 3, with sigma(t) and s(t) and
their derivatives as they stand there.
"""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from closed_forms import slope
from sampler_runs import run_table

from fastdiff import samplers, schedules, sde

pytestmark = pytest.mark.usefixtures("one_thread")

LOW, HIGH, SPREAD = 0.01, 50.0, 0.4  # SPREAD is the deviation of the data, which are Gaussian
BETA_D = 2 / (1e-3 - 1) * (math.log1p(LOW**2) / 1e-3 - math.log1p(HIGH**2))
BETA_MIN = math.log1p(HIGH**2) - BETA_D / 2
ALL = pytest.mark.parametrize(
    ("noise_schedule", "scaling"),
    [(schedule, scaling) for schedule in ("linear", "ve", "vp") for scaling in ("none", "vp")],
)
PATHS = pytest.mark.parametrize(
    "path",
    [sde.discretize(sde.EDM()), schedules.linear(), sde.discretize(sde.VP())],
    ids=["edm", "linear", "vp"],
)
LIMITS = {"sigma_min": LOW, "sigma_max": HIGH}


def sigma_of(schedule, t):
    if schedule == "vp":
        return math.sqrt(math.expm1(BETA_D * t**2 / 2 + BETA_MIN * t))
    return math.sqrt(t) if schedule == "ve" else t


def time_of(schedule, sigma):
    if schedule == "vp" and sigma:
        root = math.sqrt(BETA_MIN**2 + 2 * BETA_D * math.log1p(sigma**2))
        return (root - BETA_MIN) / BETA_D
    return sigma**2 if schedule == "ve" else sigma


def slope_of(schedule, t):
    sigma = sigma_of(schedule, t)
    if schedule == "vp":
        return (BETA_MIN + BETA_D * t) / 2 * (sigma + 1 / sigma)
    return 1 / (2 * sigma) if schedule == "ve" else 1.0


def scale_of(scaling, sigma):
    return 1 / math.sqrt(1 + sigma**2) if scaling == "vp" else 1.0


def derivative(x, t, schedule, scaling):
    """dx/dt, eq. 4: (sigma'/sigma + s'/s) x - sigma' s / sigma D(x / s, sigma)."""
    sigma, rate = sigma_of(schedule, t), slope_of(schedule, t)
    s = scale_of(scaling, sigma)
    of_scale = -sigma * rate * s**3 if scaling == "vp" else 0.0
    clean = SPREAD**2 / (SPREAD**2 + sigma**2) * x / s
    return (rate / sigma + of_scale / s) * x - rate * s / sigma * clean


def algorithm_3(x, noises, levels, schedule, scaling, *, heun, alpha=1.0, churn=0.0):
    """From x / s at the first level; a step's noise is added at its beginning."""
    times = [time_of(schedule, level) for level in levels]
    x = x * scale_of(scaling, levels[0])
    for i, after in enumerate(times[1:]):
        gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
        sigma = levels[i]
        raised = sigma * (1 + gamma)
        s = scale_of(scaling, raised)
        x_hat = s / scale_of(scaling, sigma) * x
        x_hat = x_hat + math.sqrt(raised**2 - sigma**2) * s * noises[i]
        t_hat = time_of(schedule, raised)
        h = after - t_hat
        d = derivative(x_hat, t_hat, schedule, scaling)
        x = x_hat + h * d
        if heun and after:
            inner = derivative(x_hat + alpha * h * d, t_hat + alpha * h, schedule, scaling)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + inner / (2 * alpha))
    return x / scale_of(scaling, levels[-1])


def best_model(sampler):
    """x0 of Gaussian data at the levels of the sampler's rows."""
    at = [row.at for row in sampler.rows(sampler.points)]
    told = dict(zip(sampler.table.timesteps.tolist(), at, strict=True))

    def model(x, t):
        alpha, sigma = told[t].alpha, told[t].sigma
        return alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * x

    return model


@PATHS
@ALL
@pytest.mark.parametrize(
    ("name", "options"), [("euler", {}), ("heun", {}), ("heun", {"alpha": 0.6})]
)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_the_papers_algorithm(path, noise_schedule, scaling, name, options, churn, generator):
    noises = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    sampler = samplers.make(
        name, path, 8, grid="karras", prediction="x0", clip=None, noise_schedule=noise_schedule,
        scaling=scaling, s_churn=churn, s_tmax=HIGH - 1, **LIMITS, **options,
    )  # fmt: skip
    levels = [point.ratio for point in sampler.points]
    raised = [0.0, *[churn] * 7]  # not at the first level, which some paths cannot exceed
    wanted = HIGH * noises[-1]
    for i, pair in enumerate(pairwise(levels)):
        wanted = algorithm_3(
            wanted, noises[i : i + 1], pair, noise_schedule, scaling, heun=name == "heun",
            churn=raised[i] / 8, **options,
        )  # fmt: skip
    later = torch.cat([noises[1:], noises[:1]])
    drawn = [later[step] for step in sampler.table.steps.tolist()]
    x = sampler.points[0].sigma * noises[-1]
    *_, found = run_table(sampler.table, x, drawn, best_model(sampler))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@ALL
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_orders_in_all_coordinates(noise_schedule, scaling, name, order):
    """The exact solution on Gaussian data is sqrt(spread^2 + sigma^2) times a constant."""
    path, counts = sde.discretize(sde.EDM()), (40, 60, 90)
    wanted = math.sqrt((SPREAD**2 + LOW**2) / (SPREAD**2 + HIGH**2))
    found = []
    for steps in counts:
        sampler = samplers.make(
            name, path, steps, grid="logsnr", final="sigma_min", prediction="x0", clip=None,
            noise_schedule=noise_schedule, scaling=scaling, **LIMITS,
        )  # fmt: skip
        one = torch.ones(1, dtype=torch.float64)
        *_, x = run_table(sampler.table, one, model=best_model(sampler))
        found.append(abs(x.item() / wanted - 1))
    assert slope(counts, found) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_run_that_starts_later_keeps_its_time(name):
    sampler = samplers.make(
        name, schedules.linear(), 9, grid="karras", noise_schedule="vp", scaling="vp"
    )
    sampler = pickle.loads(pickle.dumps(sampler))
    rows = sampler.table.steps >= 4
    assert torch.equal(sampler.starting_at(4).table.values, sampler.table.values[rows])


@pytest.mark.parametrize("name", ["euler", "heun", "kdpm-2", "dpm-2-ancestral", "dpmpp-sde"])
def test_rounded_levels_reach_the_model_as_whole_timesteps(name):
    path = schedules.cosine(1000)
    churn = {"s_churn": 3.0} if name in ("euler", "heun", "kdpm-2") else {}
    options = {"grid": "karras", "sigma_max": 80.0, "prediction": "x0", **churn}
    times = samplers.make(name, path, 9, round_levels=True, **options).table.timesteps
    assert torch.equal(times, times.round())
    assert not torch.equal(samplers.make(name, path, 9, **options).table.timesteps, times)


def test_churn_that_reaches_no_other_level_adds_no_noise():
    path = schedules.linear(10)
    options = {"grid": "leading", "prediction": "x0", "s_churn": 0.01}
    assert samplers.make("euler", path, 5, **options).table.needs_noise
    assert not samplers.make("euler", path, 5, round_levels=True, **options).table.needs_noise


def test_refusals():
    path = schedules.linear()
    with pytest.raises(ValueError, match=r"noise_schedule.*'cosine'"):
        samplers.make("euler", path, 5, noise_schedule="cosine")
    with pytest.raises(ValueError, match=r"scaling.*'ve'"):
        samplers.make("heun", path, 5, scaling="ve")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        samplers.make(
            "euler", schedules.flow(), 5, grid="trailing", prediction="flow", noise_schedule="ve"
        )
    with pytest.raises(ValueError, match="smaller sigma_min or a larger sigma_max"):
        samplers.make("heun", path, 5, noise_schedule="vp", sigma_min=1.0, sigma_max=5.0)
