"""DDPM against diffusers' scheduler, run step by step, and among its own variances.

Given our float64 tables, diffusers' ``step`` must agree to rounding. Two deviations of theirs are
left aside: where the last visited timestep is not 0, they add noise to the final image as well, and
their "learned" variance is the model's output itself, not its exponential as in OpenAI's code.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from sampler_runs import PREDICTIONS, fake_model, run_table

from fastdiff import schedules
from fastdiff.samplers import COLUMNS, DDPM

T, STEPS = 1000, 10
SPACINGS = {
    "leading": {"spacing": "leading"},
    "leading-offset": {"spacing": "leading", "offset": 1},
    "trailing": {"spacing": "trailing"},
    "linspace": {"spacing": "linspace"},
}


@pytest.fixture
def diffusers_run(monkeypatch, noises):
    """A function that runs a scheduler from x with the fixture's noise, none in the last step."""

    def run(scheduler, x, *, learned=False):
        module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        path = [x]
        for i, t in enumerate(scheduler.timesteps.tolist()):
            last = i + 1 == len(scheduler.timesteps)
            noise = torch.zeros_like(x) if last else noises[i].to(x.dtype)
            monkeypatch.setattr(module, lambda *_, noise=noise, **__: noise)
            out = fake_model(path[-1], t, learned=learned)
            path.append(scheduler.step(out, t, path[-1]).prev_sample)
        return torch.stack(path)

    return run


def diffusers_scheduler(steps, spacing, variance, prediction="eps", clip=True, **options):
    scheduler = DDPMScheduler(
        T,
        variance_type=variance,
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip,
        timestep_spacing=spacing["spacing"],
        steps_offset=spacing.get("offset", 0),
        **options,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def in_float64(scheduler, schedule):
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_is_that_of_diffusers(
    spacing, prediction, variance, clip, x_T, noises, diffusers_run
):
    schedule, learned = schedules.linear(T), variance == "learned_range"
    sampler = DDPM(
        schedule, STEPS, variance=variance, prediction=prediction, clip=clip, **SPACINGS[spacing]
    )
    scheduler = in_float64(
        diffusers_scheduler(STEPS, SPACINGS[spacing], variance, prediction, clip is not None),
        schedule,
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.learned_variance == learned
    ours = run_table(sampler, x_T, noises, partial(fake_model, learned=learned))
    theirs = diffusers_run(scheduler, x_T, learned=learned)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        pytest.param("linear", {"beta_schedule": "linear"}, id="linear"),
        pytest.param("cosine", {"beta_schedule": "squaredcos_cap_v2"}, id="cosine"),
    ],
)
def test_the_stock_scheduler_in_float32(name, theirs, variance, x_T, noises, diffusers_run):
    """Their float32 posterior variance is off by up to 9e-4 at small t."""
    sampler = DDPM(schedules.make(name, T), 50, variance=variance)
    scheduler = diffusers_scheduler(50, {"spacing": "leading"}, variance, **theirs)
    ours = run_table(sampler, x_T.float(), noises.float())
    theirs = diffusers_run(scheduler, x_T.float())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_all_steps_by_default(x_T):
    """The chain of T steps has the schedule's own posterior in its rows."""
    schedule = schedules.cosine(100)
    sampler = DDPM(schedule)
    assert sampler.timesteps.tolist() == list(range(99, -1, -1))
    columns = dict(zip(COLUMNS, sampler.table.flip(0).T, strict=True))
    # The chain's betas come from quotients of abar near 1: 1e-16 of 1 is 1e-12 of a beta of 1e-4.
    for name, wanted in (
        ("out_x", schedule.posterior_mean_coef_xt),
        ("out_x0", schedule.posterior_mean_coef_x0),
        ("logvar", schedule.posterior_log_variance_clipped),
    ):
        torch.testing.assert_close(columns[name], wanted, rtol=1e-9, atol=1e-12)
    assert columns["noise"].tolist() == [0.0] + [1.0] * 99
    large = DDPM(schedule, variance="fixed_large").table.flip(0)[:, COLUMNS.index("logvar")]
    torch.testing.assert_close(large, schedule.betas.log(), rtol=1e-9, atol=0)


def test_the_last_step_returns_its_mean(x_T, noises):
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
        sampler = DDPM(schedules.linear(T), STEPS, variance=variance, spacing="trailing")
        assert sampler.table[-1, COLUMNS.index("noise")] == 0
        model = partial(fake_model, learned=sampler.learned_variance)
        path = run_table(sampler, x_T, noises, model)
        last, first = noises.clone(), noises.clone()
        last[STEPS - 1] += 1
        first[0] += 1
        assert torch.equal(run_table(sampler, x_T, last, model), path)
        assert not torch.equal(run_table(sampler, x_T, first, model)[-1], path[-1])


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

    learned = run_table(DDPM(schedule, STEPS, variance="learned_range"), x_T, noises, model)
    wanted = run_table(DDPM(schedule, STEPS, variance=fixed), x_T, noises)
    torch.testing.assert_close(learned, wanted, rtol=1e-12, atol=1e-12)


def test_learned_variance_is_a_logarithm(x_T, noises):
    schedule = schedules.cosine(T)
    sampler = DDPM(schedule, STEPS, variance="fixed_small")
    log_variance = dict(
        zip(sampler.timesteps.tolist(), sampler.table[:, COLUMNS.index("logvar")], strict=True)
    )

    def model(x, t):
        out = fake_model(x, t)
        return torch.cat([out, torch.full_like(out, log_variance[t].item())], dim=1)

    learned = run_table(DDPM(schedule, STEPS, variance="learned"), x_T, noises, model)
    torch.testing.assert_close(learned, run_table(sampler, x_T, noises), rtol=1e-12, atol=1e-12)
