"""DDIM against diffusers' scheduler, run step by step, and against its limits.

diffusers keeps its tables in float32. Given ours in float64, its ``step`` must agree to rounding;
as it comes, to the accuracy of its tables. One deviation of theirs is set right first: their step
leads to t - T // n, the grid's next timestep with leading spacing only (their issue 12633).
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from sampler_runs import PREDICTIONS, fake_model, run_table

from fastdiff import schedules
from fastdiff.samplers import COLUMNS, DDIM, DDPM

T, STEPS = 1000, 10
SPACINGS = {
    "leading": {"spacing": "leading"},
    "leading-offset": {"spacing": "leading", "offset": 1},
    "trailing": {"spacing": "trailing"},
    "linspace": {"spacing": "linspace"},
}
CLIPS = {
    "unclipped": {"clip": None},
    "clipped": {"clip": (-1.0, 1.0), "use_clipped_model_output": False},
    "clipped-eps-too": {"clip": (-1.0, 1.0), "use_clipped_model_output": True},
}


def diffusers_run(scheduler, x, noises, *, eta=0.0, use_clipped=False, set_right=True):
    path, timesteps = [x], scheduler.timesteps.tolist()
    for i, t in enumerate(timesteps):
        if set_right:  # T // n must be the distance to the next timestep of the grid
            gap = t - timesteps[i + 1] if i + 1 < len(timesteps) else t + 1
            scheduler.register_to_config(num_train_timesteps=gap * len(timesteps))
        step = scheduler.step(
            fake_model(path[-1], t),
            t,
            path[-1],
            eta=eta,
            use_clipped_model_output=use_clipped,
            variance_noise=noises[i],
        )
        path.append(step.prev_sample)
    return torch.stack(path)


def diffusers_scheduler(steps, spacing, prediction="eps", clip=None, **options):
    scheduler = DDIMScheduler(
        T,
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip is not None,
        timestep_spacing=spacing["spacing"],
        steps_offset=spacing.get("offset", 0),
        **options,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def in_float64(scheduler, schedule):
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = (
        torch.tensor(1.0, dtype=torch.float64)
        if scheduler.config.set_alpha_to_one
        else schedule.alphas_cumprod[0]
    )
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids="eta={}".format)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_is_that_of_diffusers(spacing, prediction, clip, eta, x_T, noises):
    schedule = schedules.linear(T)
    sampler = DDIM(
        schedule, STEPS, eta=eta, prediction=prediction, **SPACINGS[spacing], **CLIPS[clip]
    )
    scheduler = in_float64(
        diffusers_scheduler(STEPS, SPACINGS[spacing], prediction, CLIPS[clip]["clip"]), schedule
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    ours = run_table(sampler, x_T, noises)
    use_clipped = CLIPS[clip].get("use_clipped_model_output", False)
    theirs = diffusers_run(scheduler, x_T, noises, eta=eta, use_clipped=use_clipped)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [10, 50], ids="{} steps".format)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        pytest.param("linear", {"beta_schedule": "linear"}, id="linear"),
        pytest.param(
            "scaled_linear",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            id="scaled_linear",
        ),
        pytest.param("cosine", {"beta_schedule": "squaredcos_cap_v2"}, id="cosine"),
    ],
)
def test_the_stock_scheduler_in_float32(name, theirs, steps, x_T, noises):
    """Their float32 tables are off by up to 1e-6; a run of 50 steps shows 1e-4 of it."""
    sampler = DDIM(schedules.make(name, T), steps, eta=0.5, use_clipped_model_output=False)
    scheduler = diffusers_scheduler(steps, {"spacing": "leading"}, clip=True, **theirs)
    x, z = x_T.float(), noises.float()
    ours = run_table(sampler, x, z)
    theirs = diffusers_run(scheduler, x, z, eta=0.5, set_right=False)
    torch.testing.assert_close(ours, theirs, rtol=5e-4, atol=5e-4)


def test_ending_at_the_first_abar(x_T, noises):
    """set_alpha_to_one=False, as Stable Diffusion's configuration has it."""
    schedule = schedules.scaled_linear(T)
    options = {"spacing": "leading", "offset": 1}
    sampler = DDIM(schedule, STEPS, clip=None, set_alpha_to_one=False, **options)
    scheduler = in_float64(diffusers_scheduler(STEPS, options, set_alpha_to_one=False), schedule)
    ours = run_table(sampler, x_T, noises)
    theirs = diffusers_run(scheduler, x_T, noises)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert sampler.table[-1, COLUMNS.index("out_x0")] == schedule.sqrt_alphas_cumprod[0]


def test_zero_terminal_snr(x_T, noises):
    schedule = schedules.make("linear", T, zero_terminal_snr=True)
    options = {"spacing": "trailing"}
    sampler = DDIM(schedule, STEPS, eta=1.0, prediction="v", clip=None, **options)
    scheduler = in_float64(diffusers_scheduler(STEPS, options, "v"), schedule)
    ours = run_table(sampler, x_T, noises)
    theirs = diffusers_run(scheduler, x_T, noises, eta=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_score_prediction_is_eps_prediction_scaled(x_T, noises):
    schedule = schedules.cosine(T)
    sigma = schedule.sqrt_one_minus_alphas_cumprod
    by_eps = run_table(DDIM(schedule, STEPS, prediction="eps"), x_T, noises)
    by_score = run_table(
        DDIM(schedule, STEPS, prediction="score"),
        x_T,
        noises,
        model=lambda x, t: -fake_model(x, t) / sigma[t],
    )
    torch.testing.assert_close(by_score, by_eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_full_eta_is_ddpm_with_the_small_variance(spacing, x_T, noises):
    """Song et al. 2021 (arXiv:2010.02502), section 4.1: the same mean, the same variance."""
    schedule = schedules.linear(T)
    ddim = DDIM(schedule, STEPS, eta=1.0, clip=None, **SPACINGS[spacing])
    ddpm = DDPM(schedule, STEPS, variance="fixed_small", clip=None, **SPACINGS[spacing])
    torch.testing.assert_close(
        run_table(ddim, x_T, noises), run_table(ddpm, x_T, noises), rtol=1e-8, atol=1e-8
    )


def test_no_noise_is_drawn_where_none_is_used():
    schedule = schedules.linear(T)
    assert not DDIM(schedule, STEPS).needs_noise
    noise = DDIM(schedule, STEPS, eta=0.5).table[:, COLUMNS.index("noise")]
    assert bool((noise[:-1] > 0).all())
    assert noise[-1] == 0
