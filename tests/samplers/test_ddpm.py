"""DDPM against diffusers' scheduler, run step by step, and among its own variances.

Two deviations of theirs are left aside, see ``test_differences``: where the last visited timestep
is not 0, they add noise to the final image as well, and their "learned" variance is the model's
output itself, not its exponential as in OpenAI's code.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers_runs import GRIDS, assert_agree, calm_model, quiet
from sampler_runs import PREDICTIONS, fake_model, run_table

from fastdiff import schedules
from fastdiff.samplers import DDPM

pytestmark = quiet
T, STEPS = 1000, 10
CLIPS = {  # likewise
    "unclipped": ({"clip": None}, {"clip_sample": False}),
    "clipped": ({}, {}),
    "dynamic": (
        {"dynamic_threshold": 0.8, "clip": (-1.5, 1.5)},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    ),
}


def with_variance(x, t):
    """A model with variance channels, in [-1, 1]."""
    return torch.cat([calm_model(x, t), torch.cos(3 * x - 0.02 * t)], dim=1)


def check(grid, clip, variance, x, noises, *, steps=STEPS, **options):
    (ours, theirs), (our_clip, their_clip) = GRIDS[grid], CLIPS[clip]
    noises = noises.clone()
    noises[steps - 1] = 0  # none in the last step
    learned = variance == "learned_range"
    scheduler, sampler = assert_agree(
        DDPMScheduler,
        "ddpm",
        x,
        noises,
        steps=steps,
        model=with_variance if learned else calm_model,
        theirs={"variance_type": variance, **theirs, **their_clip},
        ours={"variance": variance, **ours, **our_clip},
        **options,
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.learned_variance == learned


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_step_is_that_of_diffusers(grid, prediction, variance, clip, x_T, noises):
    check(grid, clip, variance, x_T, noises, prediction=prediction)


@pytest.mark.parametrize("steps", [25, 50], ids="{} steps".format)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_more_steps_and_schedules(variance, schedule, steps, x_T, noises):
    check(
        "leading", "clipped", variance, x_T, noises, steps=steps, schedule=schedule, prediction="v"
    )


def test_all_steps_by_default(x_T):
    """The chain of T steps has the schedule's own posterior in its rows."""
    schedule = schedules.cosine(100)
    sampler = DDPM(schedule)
    assert sampler.timesteps.tolist() == list(range(99, -1, -1))
    # The chain's betas come from quotients of abar near 1: 1e-16 of 1 is 1e-12 of a beta of 1e-4.
    for name, wanted in (
        ("out_x", schedule.posterior_mean_coef_xt),
        ("out_x0", schedule.posterior_mean_coef_x0),
        ("logvar", schedule.posterior_log_variance_clipped),
    ):
        torch.testing.assert_close(
            sampler.table.column(name).flip(0), wanted, rtol=1e-9, atol=1e-12
        )
    assert sampler.table.column("noise").tolist() == [1.0] * 99 + [0.0]
    large = DDPM(schedule, variance="fixed_large").table.column("logvar").flip(0)
    torch.testing.assert_close(large, schedule.betas.log(), rtol=1e-9, atol=0)


def test_the_last_step_returns_its_mean(x_T, noises):
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
        sampler = DDPM(schedules.linear(T), STEPS, variance=variance, grid="trailing")
        assert sampler.table.column("noise")[-1] == 0
        model = partial(fake_model, learned=sampler.learned_variance)
        path = run_table(sampler.table, x_T, noises, model)
        last, first = noises.clone(), noises.clone()
        last[STEPS - 1] += 1
        first[0] += 1
        assert torch.equal(run_table(sampler.table, x_T, last, model), path)
        assert not torch.equal(run_table(sampler.table, x_T, first, model)[-1], path[-1])


@pytest.mark.parametrize(
    ("position", "fixed"),
    [pytest.param(1.0, "fixed_large", id="v=1"), pytest.param(-1.0, "fixed_small", id="v=-1")],
)
def test_learned_range_lies_between_the_fixed_variances(position, fixed, x_T, noises):
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15."""
    schedule = schedules.cosine(T)

    def model(x, t):
        out = fake_model(x, t)
        return torch.cat([out, torch.full_like(out, position)], dim=1)

    learned = run_table(DDPM(schedule, STEPS, variance="learned_range").table, x_T, noises, model)
    wanted = run_table(DDPM(schedule, STEPS, variance=fixed).table, x_T, noises)
    torch.testing.assert_close(learned, wanted, rtol=1e-12, atol=1e-12)


def test_learned_variance_is_a_logarithm(x_T, noises):
    schedule = schedules.cosine(T)
    sampler = DDPM(schedule, STEPS, variance="fixed_small")
    log_variance = dict(
        zip(sampler.timesteps.tolist(), sampler.table.column("logvar"), strict=True)
    )

    def model(x, t):
        out = fake_model(x, t)
        return torch.cat([out, torch.full_like(out, log_variance[t].item())], dim=1)

    learned = run_table(DDPM(schedule, STEPS, variance="learned").table, x_T, noises, model)
    torch.testing.assert_close(
        learned, run_table(sampler.table, x_T, noises), rtol=1e-12, atol=1e-12
    )
