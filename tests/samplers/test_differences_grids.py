"""Where our grids and numbers differ from diffusers' on purpose, and why ours are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers_runs import (
    IMAGE,
    calm_model,
    in_double,
    only_image,
    quiet,
    relative,
    run_diffusers,
    run_operation,
    scheduler_of,
    timeless_model,
    visited,
    worst,
)
from sampler_runs import run_table

from fastdiff import samplers, schedules
from fastdiff.samplers import DDIM, grids
from fastdiff.samplers.grids import point_at_ratio, point_at_time

pytestmark = quiet
T = 1000
LINEAR = schedules.linear(T)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)


def test_steps_lead_to_the_next_timestep_of_the_grid(x_T):
    """Not to t - T // n (their issue 12633), where the model is not asked next."""
    with in_double(DDIMScheduler):
        scheduler = scheduler_of(DDIMScheduler, 4, timestep_spacing="linspace", clip_sample=False)
        theirs = run_diffusers(scheduler, x_T, model=only_image)
    sampler = DDIM(LINEAR, 4, grid="linspace", clip=None)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist() == [999, 666, 333, 0]
    ours = run_table(sampler.table, x_T, model=only_image)
    eps = only_image(x_T, 999)

    def level(t):
        point = point_at_time(LINEAR, t)
        return point.alpha * IMAGE + point.sigma * eps

    torch.testing.assert_close(ours[1], level(666), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(theirs[1], level(999 - 250), rtol=1e-10, atol=1e-10)


def test_trailing_grids_have_the_number_of_steps_asked_for():
    """Theirs is np.arange with a step that is not exact, which may have one entry more."""
    scheduler, wrong = DDIMScheduler(T, timestep_spacing="trailing"), []
    for steps in range(1, T + 1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            wrong.append(steps)
        assert len(grids._TIMES["trailing"](T, steps)) == steps
    assert len(wrong) == 62
    scheduler.set_timesteps(wrong[0])
    assert scheduler.timesteps[-1] == -1  # where there is no x to be


def test_time_and_level_belong_together():
    """Between timesteps, theirs goes from t to sigma linearly and from sigma to t by its logarithm;
    ours is the logarithm both ways."""
    with in_double(EulerDiscreteScheduler):
        scheduler = scheduler_of(EulerDiscreteScheduler, 25)
    sigmas = scheduler.sigmas[:-1].numpy()
    trained = np.asarray(LINEAR.sigma_t / LINEAR.alpha_t)
    back = scheduler._sigma_to_t(sigmas, np.log(trained))
    t = scheduler.timesteps.numpy()
    assert np.abs(back - t).max() > 1e-3
    again = [point_at_ratio(LINEAR, point_at_time(LINEAR, value).ratio).t for value in t]
    assert again == pytest.approx(t.tolist(), abs=1e-9)


def test_names_of_grids():
    """In their DPM-Solver, UniPC and DEIS classes, leading and linspace are those of n + 1 steps
    without the last; ours mean the same everywhere (arXiv:2305.08891, table 2)."""
    for spacing in ("leading", "linspace"):
        scheduler = scheduler_of(DPMSolverMultistepScheduler, 10, timestep_spacing=spacing)
        longer = [point.t for point in grids.make(LINEAR, 11, spacing)[:-1]]
        assert scheduler.timesteps.tolist() == longer[:-1]
        sampler = samplers.make("dpmpp-2m", LINEAR, 10, grid=spacing)
        assert sampler.timesteps.tolist() == DDIM(LINEAR, 10, grid=spacing).timesteps.tolist()


def test_the_model_is_told_the_time_of_its_level():
    """Their Karras timesteps are rounded in these classes."""
    for scheduler_class in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        with in_double(scheduler_class):
            scheduler = scheduler_of(scheduler_class, 25, use_karras_sigmas=True)
        ours = samplers.make("dpmpp-2m", LINEAR, 25, grid="karras")
        assert scheduler.timesteps.tolist() == ours.timesteps.round().tolist()
        off = (ours.timesteps - scheduler.timesteps).abs()
        assert 0.1 < off.max() <= 0.5


def test_starting_noise_has_the_level_of_the_grid():
    """x_T = alpha x0 + sigma eps of unit variance. Theirs leaves out x0 for linspace and trailing,
    not for leading."""
    wanted = {"leading": 1.0, "trailing": 1.0, "linspace": 1.0}
    theirs = {}
    for spacing in wanted:
        with in_double(EulerDiscreteScheduler):
            scheduler = scheduler_of(EulerDiscreteScheduler, 10, timestep_spacing=spacing)
            start = torch.as_tensor(scheduler.init_noise_sigma)
            theirs[spacing] = (start / (scheduler.sigmas[0] ** 2 + 1) ** 0.5).item()
        ours = samplers.make("euler", LINEAR, 10, grid=spacing).table.init_noise_sigma
        assert ours == wanted[spacing]
    assert theirs["leading"] == pytest.approx(1.0, rel=1e-12)
    assert theirs["trailing"] == pytest.approx(LINEAR.sigma_t[-1].item(), rel=1e-12)
    assert theirs["linspace"] < 1


def test_shifted_flow_levels_are_shifted_once():
    """Theirs takes its smallest level from the shifted ones and shifts it again: asked for all T
    steps, it does not visit the levels it was made with."""
    scheduler = FlowMatchEulerDiscreteScheduler(T, shift=3.0)
    made = scheduler.sigmas.clone()
    scheduler.set_timesteps(T)
    assert scheduler.sigmas[-2] / made[-1] == pytest.approx(3, rel=0.01)
    sampler = samplers.make("euler", schedules.flow(T, shift=3.0), T, prediction="flow")
    levels = sampler.table.levels[:-1, 1]
    torch.testing.assert_close(levels, made.double(), rtol=1e-6, atol=0)


def test_zero_terminal_snr_is_zero(x_T):
    """Theirs puts abar = 2^-24 in place of 0 (not in DDIM and DDPM): x0 of v then holds some x."""
    for scheduler_class, name in (
        (EulerDiscreteScheduler, "euler"),
        (DPMSolverMultistepScheduler, "dpmpp-2m"),
        (UniPCMultistepScheduler, "unipc-2"),
    ):
        options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        with in_double(scheduler_class):
            scheduler = scheduler_of(scheduler_class, 10, prediction="v", **options)
            theirs = run_diffusers(scheduler, x_T)
        assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-6)
        sampler = samplers.make(name, ZERO_SNR, 10, grid="trailing", prediction="v")
        assert sampler.table.levels[0].tolist() == [0.0, 1.0]
        ours = run_table(sampler.table, x_T, model=calm_model)
        assert 1e-5 < worst(ours[1:2], theirs[1:2]) < 1e-3
        point = sampler.points[1]
        x0, eps = -calm_model(x_T, 999.0), x_T  # of v where alpha is 0
        torch.testing.assert_close(
            ours[1], point.alpha * x0 + point.sigma * eps, rtol=1e-12, atol=1e-12
        )


def test_flow_begins_at_pure_noise(x_T):
    """Theirs begins at 1 - 1e-6, since its third order is NaN from 1; ours begins at 1."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3
    )
    with in_double(UniPCMultistepScheduler):
        scheduler.set_timesteps(10)
        assert scheduler.sigmas[0] == 1 - 1e-6
        scheduler.sigmas[0] = 1.0
        assert bool(run_diffusers(scheduler, x_T, model=timeless_model)[-1].isnan().any())
    sampler = samplers.make("unipc-3", schedules.flow(), 10, prediction="flow")
    assert sampler.table.levels[0].tolist() == [0.0, 1.0]
    assert bool(torch.isfinite(run_table(sampler.table, x_T, model=timeless_model)).all())


def test_schedules_are_float64():
    """Against extended precision: their float32 abar is off by 4e-7, and with it the variance of
    DDPM's posterior by more than 1e-4."""
    betas = np.linspace(np.longdouble("1e-4"), np.longdouble("0.02"), T)
    abar = np.cumprod(1 - betas)
    before = np.concatenate([[np.longdouble(1)], abar[:-1]])
    variance = (betas * (1 - before) / (1 - abar))[1:]

    def off(values, wanted):
        return float(np.abs(np.asarray(values, dtype=np.longdouble) / wanted - 1).max())

    scheduler = DDPMScheduler(T)
    assert 1e-7 < off(scheduler.alphas_cumprod.numpy(), abar) < 1e-6
    theirs = [scheduler._get_variance(t).item() for t in range(1, T)]
    assert 1e-4 < off(theirs, variance) < 1e-3
    assert off(LINEAR.alphas_cumprod.numpy(), abar) < 1e-12
    assert off(LINEAR.posterior_variance[1:].numpy(), variance) < 1e-11


def test_x_stays_in_scale(x_T):
    """In float32, x / alpha loses digits to its size, up to 157; x itself does not."""
    with in_double(HeunDiscreteScheduler):
        options = {"schedule": "linear", "prediction": "x0", "timestep_spacing": "leading"}
        exact = run_diffusers(scheduler_of(HeunDiscreteScheduler, 10, **options), x_T)
    theirs = run_diffusers(scheduler_of(HeunDiscreteScheduler, 10, **options), x_T.float())
    sampler = samplers.make("heun", LINEAR, 10, grid="leading", prediction="x0")
    ours = run_operation(sampler.table, x_T.float())
    assert relative(ours, exact) < 5e-6
    assert relative(theirs, exact) > 20 * relative(ours, exact)


def test_images_in_float64_stay_so(x_T):
    """Theirs rounds x to float32 in every step, and returns float64."""
    scheduler = scheduler_of(DPMSolverMultistepScheduler, 10)
    theirs = run_diffusers(scheduler, x_T)
    with in_double(DPMSolverMultistepScheduler):
        exact = run_diffusers(scheduler_of(DPMSolverMultistepScheduler, 10), x_T)
    sampler = samplers.make("dpmpp-2m", LINEAR, 10, grid=visited(scheduler))
    assert theirs.dtype == torch.float64
    assert relative(run_operation(sampler.table, x_T), exact) < 1e-13
    assert relative(theirs, exact) > 1e-8
