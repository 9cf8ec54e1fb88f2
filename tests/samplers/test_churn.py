"""EDM's churn: its algorithm 2 step for step, and models that are told the noise they are given."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from sampler_runs import run_table

from fastdiff import guidance, samplers, schedules, sde
from fastdiff.samplers.grids import point_at_time

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = {
    "linear": schedules.linear(100),
    "cosine": schedules.cosine(100),
    "zero SNR": schedules.make("linear", 100, zero_terminal_snr=True),
    "flow": schedules.flow(100),
    "shifted flow": schedules.flow(100, 3.0),
    "vp": sde.discretize(sde.VP(), 100),
    "sub-vp": sde.discretize(sde.SubVP(), 100),
    "ve": sde.discretize(sde.VE(), 100),
    "edm": sde.discretize(sde.EDM(), 100),
    "straight": sde.discretize(sde.Straight(), 100),
    "interpolated": sde.discretize(sde.Interpolated(schedules.cosine(100)), 100),
}
NAMES = pytest.mark.parametrize("name", ["euler", "heun", "kdpm-2"])
LARGEST = math.sqrt(2)  # by which a level may be raised at once


def denoised(x, sigma):
    """Of two clean images, +-0.6 in every value with a little spread."""
    variance = sigma**2 + 0.01
    return (0.01 * x + sigma**2 * 0.6 * torch.tanh(0.6 * x / variance)) / variance


def algorithm_2(name, x, noises, *, churn, low, high, s_noise, steps, alpha=1, rho=7):
    """Karras et al. 2022, algorithm 2, from x of sigma 80.

    "euler" leaves out the second half, "kdpm-2" takes the slope in the middle of log sigma. With
    ``alpha`` below 1 the second half is that of algorithm 3.
    """
    ends = 80 ** (1 / rho), 0.002 ** (1 / rho)
    levels = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)] + [0]
    asked = []
    for i, (t, after) in enumerate(pairwise(levels)):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t <= high else 0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * noises[i]
        slope = (x_hat - denoised(x_hat, t_hat)) / t_hat
        asked.append(t_hat)
        if after and name == "kdpm-2":
            middle = math.sqrt(t_hat * after)
            inner = x_hat + (middle - t_hat) * slope
            slope = (inner - denoised(inner, middle)) / middle
            asked.append(middle)
        step, x = after - t_hat, x_hat + (after - t_hat) * slope
        if after and name == "heun":
            inside, inner = t_hat + alpha * step, x_hat + alpha * step * slope
            again = (inner - denoised(inner, inside)) / inside
            asked.append(inside)
            x = x_hat + step * ((1 - 1 / (2 * alpha)) * slope + again / (2 * alpha))
    return x, asked


@pytest.mark.parametrize(
    ("name", "options"),
    [("euler", {}), ("heun", {}), ("heun", {"alpha": 0.5}), ("heun", {"alpha": 0.7}),
     ("kdpm-2", {})],
)  # fmt: skip
@pytest.mark.parametrize(
    ("churn", "low", "high"), [(40, 0.05, 50), (40, 0.0, math.inf), (3, 0.0, math.inf)]
)
def test_the_papers_algorithm(name, options, churn, low, high, generator):
    """Also where it raises the first level, beyond sigma_max, and with the noise's own scale."""
    steps, s_noise = 18, 1.3
    noises = torch.randn(steps + 1, 5, 2, generator=generator, dtype=torch.float64)
    wanted, levels = algorithm_2(
        name, 80 * noises[-1], noises, churn=churn, low=low, high=high, s_noise=s_noise,
        steps=steps, **options,
    )  # fmt: skip
    path, told = sde.discretize(sde.EDM()), []

    def network(x, label):
        sigma = torch.exp(4 * label[0].double())
        told.append(sigma.item())
        skip, out, scale = path.sde.preconditioning(sigma)
        return (denoised(x / scale, sigma) - skip * x / scale) / out

    model, kind = sde.on_path(network, "edm", path)
    sampler = samplers.make(
        name, path, steps, grid="karras", prediction=kind, clip=None,
        s_churn=churn, s_tmin=low, s_tmax=high, s_noise=s_noise, **options,
    )  # fmt: skip
    first = 80 * noises[-1] + (math.sqrt(levels[0] ** 2 - 80**2) * s_noise * noises[0])
    spread = math.sqrt(80**2 + s_noise**2 * (levels[0] ** 2 - 80**2))
    assert sampler.table.levels[0].tolist() == pytest.approx([1, spread], rel=1e-12)
    # A row draws the noise that the paper adds at the beginning of the next step.
    ends = sampler.table.ends_step
    later = torch.cat([noises[1:], noises[:1]])
    drawn = torch.stack([later[step] for step in sampler.table.steps.tolist()])
    assert all(not noisy or end for noisy, end in zip(sampler.table.noisy, ends, strict=True))
    *_, found = run_table(
        sampler.table, first, drawn, lambda x, t: model(x, torch.tensor(t, dtype=torch.float64))
    )
    assert told == pytest.approx(levels, rel=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@NAMES
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("grid", ["uniform", "linspace"])
def test_a_model_is_told_the_noise_that_it_is_given(path, name, grid):
    if name != "euler" and path.has_zero_terminal_snr:
        grid = [98.7 - 7 * i for i in range(10)]  # it begins where there is some signal
    options = {"prediction": "v", "clip": None, "grid": grid}
    table = samplers.make(name, path, 10, s_churn=100.0, **options).table
    plain = samplers.make(name, path, 10, **options).table
    for row, t in enumerate(table.timesteps.tolist()):
        if isinstance(path, schedules.FlowSchedule):  # whose networks are told T sigma
            assert 0 <= t <= 100
            told = [1 - t / 100, t / 100]
        elif isinstance(path, sde.DiscretizedSDE):
            at = path.sde.levels(path.time(torch.tensor(t, dtype=torch.float64)))
            told = [level.item() for level in at]
        else:
            assert 0 <= t <= 99
            point = point_at_time(path, t)
            told = [point.alpha, point.sigma]
        assert table.levels[row].tolist() == pytest.approx(told, rel=1e-9, abs=1e-11)
    ratio, before = (t.levels[:, 1] / t.levels[:, 0] for t in (table, plain))
    last = math.inf if path is PATHS["edm"] else path.sigma_t[-1] / path.alpha_t[-1]
    begins = [r for r in range(table.rows) if r == 0 or table.steps[r] != table.steps[r - 1]]
    wanted = (LARGEST * before[begins]).clamp(max=last)
    torch.testing.assert_close(ratio[begins], wanted, rtol=1e-12, atol=0)


@NAMES
def test_a_late_start_has_its_levels(name):
    """An image that is noised for a late start holds as much noise as one on its way there."""
    path = PATHS["vp"]
    sampler = samplers.make(name, path, 10, s_churn=100.0, s_noise=2.0, grid="uniform")
    plain = samplers.make(name, path, 10, grid="uniform").points[4].ratio
    late = sampler.starting_at(4).table
    wanted = plain * math.sqrt(1 + 2.0**2 * (LARGEST**2 - 1))
    assert (late.levels[0, 1] / late.levels[0, 0]).item() == pytest.approx(wanted, rel=1e-12)
    assert late.levels[0].tolist() in sampler.table.levels.tolist()


def test_a_classifiers_gradient_is_scaled_for_the_raised_level():
    path = PATHS["edm"]
    first = samplers.make("euler", path, 5, s_churn=100.0).table
    guided = guidance.classifier_guided(
        lambda x, t: torch.zeros_like(x), lambda x, t: x.sum(1), path, kind="eps"
    )
    x = torch.zeros(1, 3, dtype=torch.float64)
    found = guided(x, first.timesteps[:1])
    torch.testing.assert_close(found, torch.full_like(x, -80 * LARGEST), rtol=1e-9, atol=0)


@NAMES
def test_levels_at_the_ends_of_the_range_are_churned(name):
    """A range of one level, which a user has from the formula of the grid, holds that level."""
    path, steps = PATHS["vp"], 30
    high, low = ((path.sigma_t[i] / path.alpha_t[i]).item() ** (1 / 7) for i in (-1, 0))
    for i in range(1, steps):
        level = (high + i / (steps - 1) * (low - high)) ** 7
        sampler = samplers.make(
            name, path, steps, grid="karras", s_churn=10.0, s_tmin=level, s_tmax=level
        )
        noises = [point.noise > 0 for point in sampler.churned(sampler.points)]
        assert noises == [j == i for j in range(steps + 1)]
