"""Samplers on data that is Gaussian, where everything has a closed form.

For x_0 ~ N(mu, s^2), x_t is Gaussian and the best prediction of x_0 from it is linear in it, so a
run of a sampler is an affine map of x_T and of the noise, and its moments are had without sampling.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from closed_forms import Gaussian, consistency_boundary, final_moments, lcm_boundary, slope
from sampler_runs import run_table

from fastdiff import process, sample, samplers, schedules
from fastdiff.samplers import COLUMNS, DDIM, DDPM
from fastdiff.samplers.grids import point_at_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

T, MEAN, STD = 1000, 0.4, 0.5
LINEAR, FLOW = schedules.linear(T), schedules.flow(T)
DATA = Gaussian(MEAN, STD)
NORMAL = (0.0, 1.0)  # moments of x_T
BETWEEN = {"grid": "logsnr", "sigma_min": 0.05, "sigma_max": 5.0, "final": "sigma_min"}


def variance_errors(name, counts, *, change=lambda table: table, model=None, **options):
    """How far the final variance is from the exact one, begun with the exact one, for each S."""
    errors = []
    for steps in counts:
        table = change(samplers.make(name, LINEAR, steps, **BETWEEN, **options).table)
        start, end = DATA.moments(table.levels[0].tolist()), DATA.moments(table.levels[-1].tolist())
        mean, variance = final_moments(table, model or DATA.model(LINEAR), start)
        assert mean == pytest.approx(end[0], rel=1e-12)
        errors.append(abs(variance - end[1]))
    return errors


@pytest.mark.parametrize("grid", ["leading", "trailing", "linspace", "uniform", "logsnr"])
def test_ddim_converges_at_first_order(grid):
    """The error of the probability flow falls as 1 / steps (arXiv:2010.02502, section 4.3)."""
    steps, errors = [25, 50, 100, 200], []
    for n in steps:
        table = DDIM(LINEAR, n, clip=None, grid=grid).table
        _, variance = final_moments(table, DATA.model(LINEAR), NORMAL)
        errors.append(abs(math.sqrt(variance) - STD))
    assert 0.8 < slope(steps, errors) < 1.3, errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids="eta={}".format)
def test_ddim_reaches_the_right_moments(eta):
    table = DDIM(LINEAR, T, eta=eta, clip=None).table
    mean, variance = final_moments(table, DATA.model(LINEAR), NORMAL)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(STD, abs=0.005)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_reaches_the_right_moments(variance):
    table = DDPM(LINEAR, variance=variance, clip=None).table
    mean, got = final_moments(table, DATA.model(LINEAR), NORMAL)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert math.sqrt(got) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, T], ids="{} steps".format)
@pytest.mark.parametrize("large", [False, True], ids=["fixed_small", "fixed_large"])
def test_ddpm_has_the_moments_of_its_recursion(large, steps):
    """For any number of steps: x' = a x + b E[x_0 | x] + c z, by the respaced schedule's posterior
    (arXiv:2006.11239, eq. 7, and arXiv:2102.09672, section 4)."""
    sampler = DDPM(LINEAR, steps, clip=None, variance="fixed_large" if large else "fixed_small")
    short = LINEAR.respaced(sampler.timesteps.flip(0).long())
    mean, variance = NORMAL
    for i in reversed(range(steps)):
        abar = short.alphas_cumprod[i].item()
        gain = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)  # of E[x_0 | x_t] in x_t
        of_x0 = short.posterior_mean_coef_x0[i].item()
        factor = short.posterior_mean_coef_xt[i].item() + of_x0 * gain
        mean = factor * mean + of_x0 * (1 - gain * math.sqrt(abar)) * MEAN
        noise = (short.betas if large else short.posterior_variance)[i].item() if i else 0.0
        variance = factor**2 * variance + noise
    found = final_moments(sampler.table, DATA.model(LINEAR), NORMAL)
    assert found == pytest.approx((mean, variance), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 50], ids="{} steps".format)
def test_the_large_variance_is_exact_for_unit_gaussians(steps):
    """DDPM, section 3.2: beta is the best variance for x_0 ~ N(0, 1). All but the last step, which
    adds none, keep the variance at 1."""
    sampler = DDPM(LINEAR, steps, variance="fixed_large", clip=None, grid="trailing")
    _, variance = final_moments(sampler.table, Gaussian(0.0, 1.0).model(LINEAR), NORMAL)
    beta = LINEAR.respaced(sampler.timesteps.flip(0).long()).betas[0].item()
    assert sampler.table.column("noise")[-1] == 0
    assert sampler.table.column("logvar")[-1].exp().item() == pytest.approx(beta)
    assert variance == pytest.approx(1 - beta, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 50], ids="{} steps".format)
def test_the_small_variance_is_exact_for_a_point(steps):
    """DDPM, section 3.2: beta_tilde is the best variance for x_0 at one point."""
    table = DDPM(LINEAR, steps, variance="fixed_small", clip=None).table
    mean, variance = final_moments(table, Gaussian(MEAN, 0.0).model(LINEAR), NORMAL)
    assert mean == pytest.approx(MEAN, rel=1e-12)
    assert variance < 1e-20


@pytest.mark.parametrize("kind", process.KINDS)
def test_samples_have_the_computed_moments(kind, generator):
    """The loop itself, in float64, for each kind of prediction: within five standard errors."""
    count = 20_000
    sampler = DDPM(LINEAR, 20, prediction=kind, clip=None, grid="leading")
    drawn = sample(
        DATA.model(LINEAR, kind),
        sampler,
        (count, 1),
        generator=generator,
        dtype=torch.float64,
        progress=False,
    )
    by_eps = DDPM(LINEAR, 20, clip=None, grid="leading").table
    mean, variance = final_moments(by_eps, DATA.model(LINEAR), NORMAL)
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert drawn.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


def test_ddim_follows_the_probability_flow():
    """With small steps, x_T at a quantile of its distribution goes to that quantile of x_0's."""
    start = LINEAR.alphas_cumprod[-1].item()
    mean_T, std_T = math.sqrt(start) * MEAN, math.sqrt(start * STD**2 + 1 - start)
    quantiles = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    end = sample(
        DATA.model(LINEAR),
        DDIM(LINEAR, T, clip=None),
        quantiles.shape,
        x_T=mean_T + std_T * quantiles,
        progress=False,
    )
    torch.testing.assert_close(end, MEAN + STD * quantiles, rtol=0, atol=0.01)


def with_unrelated_noise(table):
    """DPM++ SDE's table, the second half of each step drawing all of its noise afresh."""
    values = table.values.clone()
    noise, kept = COLUMNS.index("noise"), COLUMNS.index("keep_noise")
    firsts = [r for r in range(table.rows - 1) if table.steps[r] == table.steps[r + 1]]
    for r in firsts:
        values[r + 1, noise] = math.hypot(values[r + 1, noise], values[r, kept])
        values[r, kept] = 0.0
    return replace(table, values=values)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        pytest.param("ddpm", {"clip": None}, 1, id="ddpm"),
        pytest.param("ddpm", {"clip": None, "variance": "fixed_large"}, 1, id="ddpm, large"),
        pytest.param("ddim", {"clip": None, "eta": 1.0}, 1, id="ddim, eta=1"),
        pytest.param("ddim", {"clip": None, "eta": 0.5}, 1, id="ddim, eta=0.5"),
        pytest.param("euler-ancestral", {}, 1, id="euler-ancestral"),
        pytest.param("euler", {"s_churn": 5.0}, 1, id="euler, churned"),
        pytest.param("heun", {"s_churn": 5.0}, 2, id="heun, churned"),
        pytest.param("kdpm-2", {"s_churn": 5.0}, 2, id="kdpm-2, churned"),
        pytest.param("dpm-2-ancestral", {}, 2, id="dpm-2-ancestral"),
        pytest.param("dpmpp-2s-ancestral", {"eta": 0.5}, 2, id="dpmpp-2s-ancestral, eta=0.5"),
        pytest.param("dpm-fast", {"eta": 1.0}, 2, id="dpm-fast, eta=1"),
        pytest.param(
            "dpmpp-3m-sde", {"eta": 1.0, "lower_order_final": False}, 2, id="dpmpp-3m-sde"
        ),
        pytest.param("dpmpp-sde", {}, 2, id="dpmpp-sde"),
        pytest.param("dpmpp-sde", {"eta": 0.5}, 2, id="dpmpp-sde, eta=0.5"),
        pytest.param(
            "dpmpp-sde", {"change": with_unrelated_noise}, 1, id="dpmpp-sde, unrelated noise"
        ),
        *(
            pytest.param(
                "dpmpp-2m-sde",
                {"solver_type": solver, "eta": eta, "lower_order_final": False},
                2,
                id=f"dpmpp-2m-sde, {solver}, eta={eta:g}",
            )
            for solver in ("midpoint", "heun")
            for eta in (0.5, 1.0)
        ),
    ],
)
def test_the_final_variance_converges(name, options, order):
    """Weak order, exactly: no sampling error is in the way. DPM++ SDE is of second order because
    both draws of a step are of one path; without that, it is of first order like the others. Noise
    that only leads back from a lower level costs a method of the ODE none of its order."""
    counts = [48, 72, 108, 162]
    errors = variance_errors(name, counts, **options)
    assert slope(counts, errors) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("eta", [0.3, 1.0], ids="eta={}".format)
def test_noise_that_is_not_shared_is_all_drawn_in_its_stage(eta):
    tables = [
        samplers.make("dpmpp-sde", LINEAR, 5, eta=eta, **BETWEEN, **options).table
        for options in ({}, {"shared_noise": False})
    ]
    unrelated = with_unrelated_noise(tables[0])
    torch.testing.assert_close(tables[1].values, unrelated.values, rtol=1e-12, atol=1e-12)


def test_lcm_without_a_boundary_condition_jumps_to_the_predicted_image():
    """As with an endless timestep_scaling, at every timestep but 0."""
    options = {"prediction": "x0", "grid": [900, 500, 3]}
    tables = [
        samplers.make("lcm", LINEAR, 3, timestep_scaling=scaling, **options).table
        for scaling in (None, 1e12)
    ]
    torch.testing.assert_close(tables[0].values, tables[1].values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7], ids="{} steps".format)
@pytest.mark.parametrize(
    ("name", "to", "boundary", "options"),
    [
        pytest.param("consistency", 0.05, None, BETWEEN, id="consistency"),
        pytest.param(
            "consistency", 0.05, consistency_boundary, BETWEEN | {"sigma_data": 0.5},
            id="consistency, with its boundary",
        ),
        pytest.param("lcm", 0.0, lcm_boundary, {"prediction": "x0"}, id="lcm"),
        pytest.param(
            "lcm", 0.0, lcm_boundary, {"prediction": "x0", "grid": "trailing"}, id="lcm, trailing"
        ),
    ],
)  # fmt: skip
def test_exact_jumps_have_the_exact_moments(name, to, boundary, options, steps):
    """With the exact consistency function, any number of jumps draws from the data's distribution
    (at the level where the function ends)."""
    table = samplers.make(name, LINEAR, steps, **options).table
    start, end = DATA.moments(table.levels[0].tolist()), DATA.moments(table.levels[-1].tolist())
    found = final_moments(table, DATA.jump(LINEAR, to, boundary), start)
    assert found == pytest.approx(end, rel=1e-12)


def test_the_mixtures_solution_is_the_closed_one(generator):
    """The numerical solution that other tests refer to, where there is a formula."""
    start, end = point_at_ratio(FLOW, 5.0), point_at_ratio(FLOW, 0.05)
    x = DATA.draw(8, generator, start.alpha, start.sigma)
    found, wanted = DATA.solve(x, start, end), DATA.solution(x, start, end)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [LINEAR, FLOW], ids=["linear", "flow"])
@pytest.mark.parametrize("kind", process.KINDS[1:])
@pytest.mark.parametrize("name", samplers.names())
def test_a_run_is_the_same_for_every_kind_of_prediction(name, kind, path):
    """And so is it with thresholds, which act on x0 whatever is predicted. (A consistency model's
    output is not a prediction, but the arithmetic is the same.)"""
    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64).view(-1, 1)
    times = [float(t) for t in range(T - 10, 0, -99)]  # not the last: flow has no signal there
    options = {"grid": times, "clip": (-1.2, 1.2)}
    noises = torch.randn(
        3 * len(times), 13, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    runs = [
        run_table(
            samplers.make(name, path, len(times), prediction=k, **options).table,
            x_T,
            noises,
            DATA.model(path, k),
        )
        for k in ("eps", kind)
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


class Exploding(schedules.GaussianPath):
    """Images that are not scaled under growing noise, as in score_sde (arXiv:2011.13456)."""

    sigma_t = torch.logspace(-2, 1.5, T, dtype=torch.float64)
    alpha_t = torch.ones_like(sigma_t)

    def levels(self, ratio):
        return torch.ones_like(ratio), ratio


@pytest.mark.parametrize("path", [FLOW, Exploding()], ids=["flow", "exploding"])
@pytest.mark.parametrize("name", sorted(set(samplers.names()) - {"lcm", "ddim-inverse"}))
def test_a_run_depends_on_sigma_over_alpha_alone(name, path):
    """x / alpha takes the same values on any Gaussian path, at the same sigma / alpha. (Not so for
    LCM's boundary condition, which is one of t and of x as it is, nor for DDIM's inversion, which
    gives the model an x of another level.)"""
    runs, y = [], torch.linspace(-12, 12, 13, dtype=torch.float64).view(-1, 1)
    noises = torch.randn(30, 13, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"prediction": "eps", "clip": (-1.2, 1.2)}
    with_eta = ("ddim", "dpmpp-sde", "dpm-fast")
    options |= {"eta": 0.7} if name in with_eta or name.endswith("-ancestral") else {}
    options |= {"s_churn": 2.0} if name in ("euler", "heun", "kdpm-2") else {}
    for each in (LINEAR, path):
        table = samplers.make(name, each, 10, **BETWEEN, **options).table
        run = run_table(table, table.levels[0, 0] * y, noises, DATA.model(each))
        runs.append(run / table.levels[:, :1, None])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-9)


def test_first_order_methods_are_ddim():
    """Euler, DPM-Solver-1, DPM-Solver++(1S), LMS of order 1, UniPC-1 without its corrector, and the
    stochastic ones without noise: one update in six notations."""
    grid = {"grid": "uniform", "final": "zero"}
    wanted = DDIM(LINEAR, 12, clip=None, **grid).table
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).view(-1, 1)
    same = {
        "euler": {},
        "euler-ancestral": {"eta": 0.0},
        "dpm-1": {},
        "dpmpp-1s": {},
        "lms": {"order": 1},
        "unipc-1": {"disable_corrector": range(12)},
    }
    model = DATA.model(LINEAR)
    path = run_table(wanted, x, model=model)
    for name, options in same.items():
        table = samplers.make(name, LINEAR, 12, **grid, **options).table
        found = run_table(table, x, model=model)
        torch.testing.assert_close(found, path, rtol=1e-11, atol=1e-12, msg=name)


def test_full_noise_is_ddpm():
    """DDIM with eta = 1 (arXiv:2010.02502, section 4.1) and Euler's ancestral method draw from
    DDPM's posterior."""
    noises = torch.randn(12, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).view(-1, 1)
    runs = [
        run_table(
            samplers.make(name, LINEAR, 12, grid="trailing", clip=None, **options).table,
            x,
            noises,
            DATA.model(LINEAR),
        )
        for name, options in (("ddpm", {}), ("ddim", {"eta": 1.0}), ("euler-ancestral", {}))
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", ["euler", "heun", "kdpm-2"])
def test_churn_raises_every_level_but_the_last(name, final):
    """Also where the run ends before zero noise, and by as much when it starts later."""
    options = BETWEEN | {"final": final, "s_churn": 10.0}
    table = samplers.make(name, LINEAR, 40, **options).table
    assert not table.noisy[-1]
    firsts = [r for r in range(table.rows) if r == 0 or table.steps[r] != table.steps[r - 1]]
    plain = samplers.make(name, LINEAR, 40, **options | {"s_churn": 0.0}).table
    ratio, before = (t.levels[:, 1] / t.levels[:, 0] for t in (table, plain))
    torch.testing.assert_close(ratio[firsts], 1.25 * before[firsts], rtol=1e-12, atol=0)
    assert ratio[-1] == before[-1]
    later = samplers.make(name, LINEAR, 40, **options).starting_at(30).table
    torch.testing.assert_close(later.values, table.values[-later.rows :], rtol=0, atol=0)
