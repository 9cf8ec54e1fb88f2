"""Which levels of noise a sampler visits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from fastdiff import schedules, sde
from fastdiff.samplers import grids
from fastdiff.samplers.grids import Point, point_at_ratio, point_at_time

T = 1000
LINEAR = schedules.linear(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
FLOW = schedules.flow(T, shift=2.0)
WHOLE = ("leading", "trailing", "linspace", "quadratic")
RATIOS = ("karras", "exponential", "polyexponential", "logsnr", "vp", "iddpm")


def times(grid, steps, path=LINEAR, **options):
    return [point.t for point in grids.make(path, steps, grid, **options)[:-1]]


def ratios(grid, steps, path=LINEAR, **options):
    return [point.ratio for point in grids.make(path, steps, grid, **options)[:-1]]


def exact_times(grid, steps):
    """The visited times before rounding, as fractions: numerators [steps] and the denominator."""
    i = torch.arange(steps)
    if grid == "leading":
        return (steps - 1 - i) * (T // steps), 1
    if grid == "trailing":
        return (T - 1) * steps - i * T, steps
    below = max(steps - 1, 1)
    return (T - 1) * (below - i), below


@pytest.mark.parametrize("grid", ["leading", "trailing", "linspace"])
def test_every_number_of_steps(grid):
    for steps in range(1, T + 1):
        got = torch.tensor(grids._TIMES[grid](T, steps))
        assert got.shape == (steps,)
        assert 0 <= got[-1] <= got[0] < T
        assert bool((got[1:] < got[:-1]).all()), steps
        assert bool((got == got.round()).all()), steps
        numerators, denominator = exact_times(grid, steps)
        off = (got.long() * denominator - numerators).abs()
        assert bool((2 * off <= denominator).all()), steps


@pytest.mark.parametrize("grid", grids.NAMES)
@pytest.mark.parametrize("path", [LINEAR, schedules.cosine(T), FLOW], ids=["linear", "cos", "flow"])
@pytest.mark.parametrize("final", grids.FINALS)
def test_levels_fall_to_the_end(final, path, grid):
    for steps in (1, 2, 3, 10, 57):
        if final == "sigma_min" and (
            (steps > 1 and grid not in ("trailing", "uniform", "logsnr"))
            or (steps == 1 and grid == "leading")
        ):
            continue  # the last level is visited already: refused, as tested below
        options = {"sigma_max": 300.0} if path is FLOW and grid in RATIOS else {}
        points = grids.make(path, steps, grid, final=final, **options)
        assert len(points) == steps + 1
        assert all(b.ratio < a.ratio for a, b in pairwise(points))
        assert all(b.t < a.t for a, b in pairwise(points))
        if final == "zero":
            assert points[-1] == Point(-1.0, 1.0, 0.0)
        else:
            assert points[-1].ratio == pytest.approx(path.sigma_t[0] / path.alpha_t[0])


@pytest.mark.parametrize(
    ("grid", "steps", "wanted"),
    [
        pytest.param("leading", 4, [750, 500, 250, 0], id="leading"),
        pytest.param("trailing", 4, [999, 749, 499, 249], id="trailing"),
        pytest.param("linspace", 4, [999, 666, 333, 0], id="linspace"),
        pytest.param("uniform", 4, [999, 749.25, 499.5, 249.75], id="uniform"),
        pytest.param("quadratic", 4, [999, 444, 111, 0], id="quadratic"),
        pytest.param("leading", 3, [666, 333, 0], id="leading-3"),
        pytest.param("trailing", 3, [999, 666, 332], id="trailing-3"),
        pytest.param("leading", 1, [0], id="leading-1"),
        pytest.param("trailing", 1, [999], id="trailing-1"),
        pytest.param("linspace", 1, [999], id="linspace-1"),
        pytest.param("uniform", 1, [999], id="uniform-1"),
        pytest.param("quadratic", 1, [999], id="quadratic-1"),
    ],
)
def test_known_values(grid, steps, wanted):
    assert times(grid, steps) == wanted


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 500, 999, 1000], ids="{} steps".format)
def test_quadratic_visits_no_timestep_twice(steps):
    """Where rounding would, neighbours move up; (i / (S - 1))^2 is kept elsewhere."""
    got = times("quadratic", steps)
    assert len(set(got)) == steps
    assert got == sorted(got, reverse=True)
    assert got[0] == T - 1
    if 1 < steps <= 30:
        assert got == [round((T - 1) * (i / (steps - 1)) ** 2) for i in reversed(range(steps))]


def test_all_timesteps_on_every_grid():
    for grid in WHOLE:
        assert times(grid, T) == list(range(T - 1, -1, -1))


def test_offset_moves_leading_timesteps():
    """Stable Diffusion's offset of 1."""
    assert times("leading", 4, offset=1) == [751, 501, 251, 1]
    assert times("leading", 10, offset=99)[0] == 999


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 5, 7, 10, 20, 50, 100, 250, 333, 500, 1000])
def test_the_usual_numbers_of_steps_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert np.array_equal(times(spacing, steps), scheduler.timesteps.numpy())


@pytest.mark.parametrize("limits", [{}, {"sigma_min": 0.02, "sigma_max": 80.0}], ids=["own", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50], ids="{} steps".format)
def test_grids_of_ratios(steps, limits):
    low = limits.get("sigma_min", (LINEAR.sigma_t[0] / LINEAR.alpha_t[0]).item())
    high = limits.get("sigma_max", (LINEAR.sigma_t[-1] / LINEAR.alpha_t[-1]).item())
    u = np.arange(steps) / max(steps - 1, 1)
    for rho in (7.0, 3.0):
        wanted = (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        assert ratios("karras", steps, rho=rho, **limits) == pytest.approx(wanted, rel=1e-12)
    wanted = np.exp(np.log(high) + u * np.log(low / high))
    assert ratios("exponential", steps, **limits) == pytest.approx(wanted, rel=1e-12)
    assert ratios("polyexponential", steps, **limits) == pytest.approx(wanted, rel=1e-12)
    wanted = np.exp(np.log(low) + (1 - u) ** 2.5 * np.log(high / low))
    found = ratios("polyexponential", steps, rho=2.5, **limits)
    assert found == pytest.approx(wanted, rel=1e-12)
    points = grids.make(LINEAR, steps, "logsnr", final="sigma_min", **limits)
    wanted = np.linspace(-np.log(high), -np.log(low), steps + 1)
    assert [point.lam for point in points] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 30], ids="{} steps".format)
def test_the_grids_of_edms_ablations(steps):
    """Karras et al. 2022, arXiv:2206.00364, table 1, columns VP and iDDPM, with their formulas."""
    low, high = 0.01, 80.0
    found = ratios("vp", steps, sigma_min=low, sigma_max=high)
    t = np.linspace(1, 1e-3, steps)
    beta_d = 2 / (1e-3 - 1) * (np.log(1 + low**2) / 1e-3 - np.log(1 + high**2))
    beta_min = np.log(1 + high**2) - beta_d / 2
    wanted = np.sqrt(np.exp(beta_d * t**2 / 2 + beta_min * t) - 1)
    assert found == pytest.approx(wanted, rel=1e-9)
    # u of step j - 1 from that of step j, M = 1000, C_1 = 0.001, C_2 = 0.008.
    kept = [1 - math.cos(math.pi * j / 1000 / 1.008) for j in range(1001)]  # 2 sin^2 of the half
    u = [0.0]
    for j in range(1000, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(kept[j - 1] / kept[j], 0.001) - 1))
    inside = [level for level in reversed(u) if low <= level <= high]
    wanted = [inside[round((len(inside) - 1) * i / max(steps - 1, 1))] for i in range(steps)]
    assert ratios("iddpm", steps, sigma_min=low, sigma_max=high) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("path", [LINEAR, schedules.cosine(T)], ids=["linear", "cosine"])
@pytest.mark.parametrize("grid", ["karras", "vp", "uniform", "iddpm"])
def test_rounded_levels_are_the_nearest_trained_ones(path, grid):
    levels = (path.sigma_t / path.alpha_t).numpy()
    limits = {} if grid == "uniform" else {"sigma_max": 80.0}
    points = grids.make(path, 13, grid, round_levels=True, **limits)
    for point, asked in zip(points[:-1], ratios(grid, 13, path, **limits), strict=True):
        assert point.t == np.abs(levels - asked).argmin()
        assert point.ratio == pytest.approx(levels[int(point.t)], rel=1e-12)
    end = grids.make(path, 5, "logsnr", final="sigma_min", sigma_min=0.333, round_levels=True)[-1]
    assert end.t == np.abs(levels - 0.333).argmin()


def test_levels_beyond_the_schedule():
    """sigma / alpha may leave the schedule's range, t may not, unless the path extends."""
    first, *_, last = grids.make(LINEAR, 5, "karras", sigma_min=1e-3, sigma_max=1e3)[:-1]
    assert (first.t, last.t) == (999.0, 0.0)
    assert first.ratio == pytest.approx(1e3)
    assert last.ratio == pytest.approx(1e-3)
    assert first.alpha**2 + first.sigma**2 == pytest.approx(1, rel=1e-15)
    edm = sde.discretize(sde.EDM())
    first, *_, last = grids.make(edm, 5, "karras", sigma_min=1e-3, sigma_max=1e3)[:-1]
    assert first.t > 999
    assert last.t < 0
    times = edm.time(torch.tensor([first.t, last.t], dtype=torch.float64))
    assert times.tolist() == pytest.approx([1e3, 1e-3])


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([999, 500, 3], id="ints"),
        pytest.param((999.0, 500.0, 3.0), id="floats"),
        pytest.param(torch.tensor([999, 500, 3]), id="int tensor"),
        pytest.param(np.array([999.0, 500.0, 3.0], dtype=np.float32), id="numpy"),
    ],
)
def test_timesteps_one_by_one(given):
    points = grids.make(LINEAR, 3, given)
    assert [point.t for point in points] == [999, 500, 3, -1]
    assert points[1].alpha == LINEAR.alpha_t[500]
    assert points[1].sigma == LINEAR.sigma_t[500]


def test_fractional_timesteps():
    """Half-way between two timesteps, half-way in log(sigma / alpha)."""
    point = grids.make(LINEAR, 1, [499.5])[0]
    assert point.t == 499.5
    assert point.lam == pytest.approx(LINEAR.lambda_t[499:501].mean().item(), rel=1e-12)


@pytest.mark.parametrize("path", [LINEAR, ZERO_SNR, FLOW], ids=["linear", "zero-snr", "flow"])
def test_time_and_ratio_are_inverse(path):
    # At T - 1, a path without signal has no ratio to come back from.
    highest = T - 1 if path is LINEAR else T - 1.01
    for t in (0, 0.25, 1, 17.9, 500, 731.5, T - 2, T - 1.5, highest):
        point = point_at_time(path, t)
        again = point_at_ratio(path, point.ratio)
        assert again.t == pytest.approx(t, abs=1e-9)
        assert (again.alpha, again.sigma) == pytest.approx((point.alpha, point.sigma), rel=1e-9)


@pytest.mark.parametrize("path", [ZERO_SNR, FLOW], ids=["zero-snr", "flow"])
def test_levels_beside_a_timestep_without_signal(path):
    last = point_at_time(path, T - 1)
    assert (last.alpha, last.sigma, last.ratio, last.lam) == (0.0, 1.0, math.inf, -math.inf)
    between = [point_at_time(path, T - 2 + share) for share in (0.0, 0.3, 0.9)]
    assert all(b.ratio > a.ratio for a, b in pairwise(between))
    assert math.isfinite(between[-1].ratio)


def test_whole_timesteps_have_the_levels_of_the_schedule():
    for path in (LINEAR, ZERO_SNR, FLOW):
        for t in (0, 1, 500, T - 1):
            point = point_at_time(path, t)
            assert (point.alpha, point.sigma) == (path.alpha_t[t], path.sigma_t[t])


def test_flow_levels():
    """alpha + sigma = 1, and the ends are the schedule's."""
    points = grids.make(FLOW, 10, "linspace")
    assert points[0] == Point(999.0, 0.0, 1.0)
    assert points[-2].sigma == FLOW.sigma_t[0]
    for point in (*points, *grids.make(FLOW, 10, "karras", sigma_max=100.0)):
        assert point.alpha + point.sigma == pytest.approx(1, rel=1e-14)


def test_the_end():
    assert grids.make(LINEAR, 10, "trailing", final="sigma_min")[-1].t == 0
    points = grids.make(LINEAR, 10, "logsnr", final="sigma_min", sigma_min=0.05)
    assert points[-1].ratio == pytest.approx(0.05)
    assert points[-1].t == pytest.approx(point_at_ratio(LINEAR, 0.05).t)


def refused(arguments, options, message, name):
    return pytest.param(arguments, options, message, id=name)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        refused((0, "leading"), {}, r"1\.\.1000 .* got 0", "no steps"),
        refused((-3, "leading"), {}, r"1\.\.1000 .* got -3", "negative"),
        *(refused((T + 1, g), {}, r"1\.\.1000 .* got 1001", f"{g} beyond T") for g in WHOLE),
        refused((0, "karras"), {}, "from 1 on, got 0", "no karras steps"),
        refused((0, [5]), {}, "from 1 on, got 0", "no listed steps"),
        refused((10, "cosine"), {}, "unknown grid 'cosine'.*leading.*logsnr", "unknown grid"),
        refused((10, "leading"), {"final": "one"}, "unknown final 'one'.*zero", "unknown final"),
        refused((10, "trailing"), {"offset": 1}, "leading grid only, got 1", "offset of trailing"),
        refused((10, "leading"), {"offset": 100}, r"outside 0\.\.999: 100\.\.1000", "large offset"),
        refused((T, "leading"), {"offset": 1}, r"outside 0\.\.999", "offset with all steps"),
        refused((10, "leading"), {"offset": -1}, r"-1\.\.899", "negative offset"),
        refused((3, [3, 2]), {}, "steps is 3, but the grid has 2", "wrong length"),
        refused((3, [3, 3, 2]), {}, "must fall", "repeated"),
        refused((3, [1, 2, 3]), {}, "must fall", "rising"),
        refused((2, [1000, 3]), {}, r"0\.\.999, got 3\.\.1000", "above"),
        refused((2, [3, -1]), {}, r"0\.\.999, got -1\.\.3", "below"),
        refused((2, [math.nan, 3]), {}, "grid", "NaN"),
        refused((9, "karras"), {"sigma_min": 2.0, "sigma_max": 1.0}, "got 2 and 1", "crossed"),
        refused(
            (9, "karras"), {"sigma_min": 0.0}, "sigma_min must be positive.*0", "zero sigma_min"
        ),
        refused((9, "vp"), {"sigma_min": 1.0, "sigma_max": 9.0}, "smaller sigma_min", "short vp"),
        refused((9, "iddpm"), {"sigma_min": 5.0, "sigma_max": 5.1}, "too few for 9", "short iddpm"),
        refused((99, "karras"), {"round_levels": True}, "nearest to timestep", "rounded to one"),
        *(
            refused((9, g), {"final": "sigma_min"}, "visits the last level", f"{g} twice the end")
            for g in (
                "leading",
                "linspace",
                "quadratic",
                "karras",
                "exponential",
                "polyexponential",
                "vp",
            )
        ),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        grids.make(LINEAR, *arguments, **options)


@pytest.mark.parametrize("path", [ZERO_SNR, FLOW], ids=["zero-snr", "flow"])
@pytest.mark.parametrize("grid", RATIOS)
def test_ratios_need_a_largest_one(grid, path):
    with pytest.raises(ValueError, match=r"infinite.*give sigma_max"):
        grids.make(path, 5, grid)
    assert len(grids.make(path, 5, grid, sigma_max=50.0)) == 6
