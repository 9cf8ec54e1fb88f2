"""DDIM against diffusers' scheduler, run step by step, and against its limits.

One deviation of theirs is set right first: their step leads to t - T // n, the grid's next timestep
with leading spacing only (their issue 12633).
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_runs import GRIDS, assert_agree, quiet
from sampler_runs import PREDICTIONS, fake_model, run_table

from fastdiff import schedules
from fastdiff.samplers import DDIM, DDPM

pytestmark = quiet
T, STEPS = 1000, 10
CLIPS = {  # likewise, and of their step
    "unclipped": ({"clip": None}, {"clip_sample": False}, {}),
    "clipped": ({"clip": (-1.0, 1.0), "use_clipped_model_output": False}, {}, {}),
    "clipped-eps-too": ({"clip": (-1.0, 1.0)}, {}, {"use_clipped_model_output": True}),
    "dynamic": (
        {"dynamic_threshold": 0.8, "clip": (-1.5, 1.5), "use_clipped_model_output": False},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
        {},
    ),
}


def to_the_next_timestep(scheduler, row):
    """T // n must be the distance to the next timestep of the grid."""
    timesteps = [*scheduler.timesteps.tolist(), -1]
    gap = timesteps[row] - timesteps[row + 1]
    scheduler.register_to_config(num_train_timesteps=gap * (len(timesteps) - 1))


def check(grid, clip, eta, x, noises, **options):
    (ours, theirs), (our_clip, their_clip, step_options) = GRIDS[grid], CLIPS[clip]
    scheduler, sampler = assert_agree(
        DDIMScheduler,
        "ddim",
        x,
        noises,
        before=to_the_next_timestep,
        step_options={"eta": eta, **step_options},
        theirs={**theirs, **their_clip},
        ours={"eta": eta, **ours, **our_clip},
        **options,
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids="eta={}".format)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_step_is_that_of_diffusers(grid, prediction, clip, eta, x_T, noises):
    check(grid, clip, eta, x_T, noises, steps=STEPS, prediction=prediction)


@pytest.mark.parametrize("steps", [25, 50], ids="{} steps".format)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("clip", CLIPS)
def test_more_steps_and_schedules(clip, schedule, steps, x_T, noises):
    check("trailing", clip, 0.5, x_T, noises, steps=steps, schedule=schedule, prediction="v")


def test_ending_at_the_first_abar(x_T):
    """set_alpha_to_one=False, as Stable Diffusion's configuration has it."""
    _, sampler = assert_agree(
        DDIMScheduler,
        "ddim",
        x_T,
        steps=STEPS,
        schedule="scaled_linear",
        theirs={"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
        ours={"grid": "leading", "offset": 1, "clip": None, "final": "sigma_min"},
    )
    schedule = schedules.scaled_linear(T)
    assert sampler.table.column("out_x0")[-1] == schedule.sqrt_alphas_cumprod[0]


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr(prediction, x_T, noises):
    """Theirs has the schedule exactly here, as ours."""
    schedule = schedules.make("linear", T, zero_terminal_snr=True)
    sampler = DDIM(schedule, STEPS, eta=1.0, prediction=prediction, grid="trailing")
    path = run_table(sampler.table, x_T, noises)
    assert bool(torch.isfinite(path).all())
    assert sampler.table.levels[0].tolist() == [0.0, 1.0]
    # Nothing of x is in the first x0, and all of it in the first eps.
    x0 = fake_model(x_T, T - 1.0)
    x0 = (x0 if prediction == "x0" else -x0).clamp(-1, 1)
    alpha, sigma = sampler.table.levels[1].tolist()
    torch.testing.assert_close(path[1], alpha * x0 + sigma * noises[0], rtol=1e-12, atol=1e-12)


def test_score_prediction_is_eps_prediction_scaled(x_T, noises):
    schedule = schedules.cosine(T)
    sigma = schedule.sqrt_one_minus_alphas_cumprod
    by_eps = run_table(DDIM(schedule, STEPS, prediction="eps").table, x_T, noises)
    by_score = run_table(
        DDIM(schedule, STEPS, prediction="score").table,
        x_T,
        noises,
        model=lambda x, t: -fake_model(x, t) / sigma[int(t)],
    )
    torch.testing.assert_close(by_score, by_eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_full_eta_is_ddpm_with_the_small_variance(grid, x_T, noises):
    """Song et al. 2021 (arXiv:2010.02502), section 4.1: the same mean, the same variance."""
    schedule, options = schedules.linear(T), GRIDS[grid][0]
    ddim = DDIM(schedule, STEPS, eta=1.0, clip=None, **options).table
    ddpm = DDPM(schedule, STEPS, variance="fixed_small", clip=None, **options).table
    torch.testing.assert_close(
        run_table(ddim, x_T, noises), run_table(ddpm, x_T, noises), rtol=1e-8, atol=1e-8
    )


def test_no_noise_is_drawn_where_none_is_used():
    schedule = schedules.linear(T)
    assert not DDIM(schedule, STEPS).table.needs_noise
    table = DDIM(schedule, STEPS, eta=0.5).table
    assert table.noisy == [True] * (STEPS - 1) + [False]
