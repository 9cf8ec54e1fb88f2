"""Samplers that look no further back than their present step, beside diffusers' schedulers.

Both visit the same timesteps. What the two do differently on purpose is in ``test_differences``.
"""

from __future__ import annotations

import importlib
import math
import sys
import types

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers_runs import (
    assert_agree,
    both_solvers,
    calm_model,
    every_prediction,
    every_spacing,
    in_double,
    quiet,
    run_diffusers,
    spaced_steps,
    steps_10_25_50,
    timeless_model,
    uneven_levels,
    worst,
)
from sampler_runs import run_table

from fastdiff import samplers, schedules
from fastdiff.samplers.euler_ancestral import ancestral
from fastdiff.samplers.grids import point_at_ratio

pytestmark = quiet
AS_THEIRS = {"midpoint": "diffusers", "heun": "heun"}  # our name of their form of a solver type


def whole(spacing):
    """The schedule on which their timesteps are whole numbers."""
    return "fine" if spacing == "linspace" else "linear"


@steps_10_25_50
@every_spacing
@every_prediction
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        pytest.param("euler", EulerDiscreteScheduler, id="euler"),
        pytest.param("heun", HeunDiscreteScheduler, id="heun"),
    ],
)
def test_euler_and_heun(name, scheduler_class, prediction, spacing, steps, x_T):
    assert_agree(
        scheduler_class,
        name,
        x_T,
        steps=steps,
        schedule=whole(spacing),
        prediction=prediction,
        theirs={"timestep_spacing": spacing},
    )


@uneven_levels
@every_prediction
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        pytest.param("euler", EulerDiscreteScheduler, id="euler"),
        pytest.param("heun", HeunDiscreteScheduler, id="heun"),
    ],
)
def test_levels_between_timesteps(name, scheduler_class, prediction, grid, x_T):
    """The model is told the same fractional timesteps, too."""
    scheduler, sampler = assert_agree(
        scheduler_class,
        name,
        x_T,
        steps=25,
        prediction=prediction,
        theirs={f"use_{grid}_sigmas": True},
        ours={"grid": grid},
    )
    levels = torch.unique_consecutive(scheduler.sigmas)
    assert [point.ratio for point in sampler.points] == pytest.approx(levels.tolist())
    assert sampler.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-9)


def test_euler_that_ends_at_the_first_level(x_T):
    assert_agree(
        EulerDiscreteScheduler,
        "euler",
        x_T,
        steps=10,
        theirs={"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        ours={"final": "sigma_min"},
    )


def test_heun_with_clipped_x0(x_T):
    assert_agree(
        HeunDiscreteScheduler,
        "heun",
        x_T,
        steps=10,
        theirs={"timestep_spacing": "trailing", "clip_sample": True, "clip_sample_range": 0.8},
        ours={"clip": (-0.8, 0.8)},
    )


@steps_10_25_50
@every_spacing
@pytest.mark.parametrize("prediction", ["eps", "v"])  # x0 they do not have
def test_euler_ancestral(prediction, spacing, steps, x_T, noises):
    assert_agree(
        EulerAncestralDiscreteScheduler,
        "euler-ancestral",
        x_T,
        noises,
        steps=steps,
        schedule=whole(spacing),
        prediction=prediction,
        theirs={"timestep_spacing": spacing},
    )


@pytest.mark.parametrize("steps", [10, 11, 12, 25, 50], ids="{} steps".format)
@every_prediction
@both_solvers
@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
def test_dpm_solver(order, solver_type, prediction, steps, x_T):
    """Of DPM-Solver-fast's groups: every remainder of the steps by the order."""
    assert_agree(
        DPMSolverSinglestepScheduler,
        f"dpm-{order}",
        x_T,
        steps=steps,
        prediction=prediction,
        theirs={
            "algorithm_type": "dpmsolver",
            "solver_order": order,
            "solver_type": solver_type,
            "lower_order_final": True,
            "final_sigmas_type": "sigma_min",
        },
        ours={"solver_type": AS_THEIRS[solver_type], "final": "sigma_min"},
    )


@pytest.mark.parametrize("order", [2, 3], ids="order {}".format)
@both_solvers
def test_dpm_solver_of_full_order_to_the_end(solver_type, order, x_T):
    assert_agree(
        DPMSolverSinglestepScheduler,
        f"dpm-{order}",
        x_T,
        steps=12,
        theirs={
            "algorithm_type": "dpmsolver",
            "solver_order": order,
            "final_sigmas_type": "sigma_min",
            "solver_type": solver_type,
            "lower_order_final": False,
        },
        ours={
            "final": "sigma_min",
            "solver_type": AS_THEIRS[solver_type],
            "lower_order_final": False,
        },
    )


@pytest.mark.parametrize("steps", [10, 11, 25, 50], ids="{} steps".format)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@every_prediction
@both_solvers
@pytest.mark.parametrize("order", [1, 2], ids="order {}".format)
def test_dpmpp_singlestep(order, solver_type, prediction, final, steps, x_T):
    assert_agree(
        DPMSolverSinglestepScheduler,
        f"dpmpp-{order}s",
        x_T,
        steps=steps,
        prediction=prediction,
        theirs={
            "solver_order": order,
            "solver_type": solver_type,
            "lower_order_final": True,
            "final_sigmas_type": final,
        },
        ours={"solver_type": solver_type, "final": final},
    )


@uneven_levels
@pytest.mark.parametrize("order", [1, 2], ids="order {}".format)
def test_dpmpp_singlestep_on_levels_between_timesteps(order, grid, x_T):
    scheduler, sampler = assert_agree(
        DPMSolverSinglestepScheduler,
        f"dpmpp-{order}s",
        x_T,
        steps=25,
        model=timeless_model,
        theirs={"solver_order": order, "lower_order_final": True, f"use_{grid}_sigmas": True},
        ours={"grid": grid},
    )
    assert [point.ratio for point in sampler.points] == pytest.approx(scheduler.sigmas.tolist())


@pytest.mark.parametrize(
    ("name", "scheduler_class", "algorithm"),
    [
        pytest.param("dpmpp-2s", DPMSolverSinglestepScheduler, "dpmsolver++", id="dpmpp-2s"),
        # In eps, where eps must follow the new x0; their singlestep class fails here.
        pytest.param("dpm-1", DPMSolverMultistepScheduler, "dpmsolver", id="dpm-1"),
    ],
)
def test_dynamic_threshold(name, scheduler_class, algorithm, x_T):
    assert_agree(
        scheduler_class,
        name,
        x_T,
        steps=10,
        theirs={
            "algorithm_type": algorithm,
            "solver_order": int(name.split("-")[1][0]),
            "lower_order_final": True,
            "final_sigmas_type": "sigma_min",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.8,
            "sample_max_value": 1.5,
        },
        ours={"final": "sigma_min", "dynamic_threshold": 0.8, "clip": (-1.5, 1.5)},
    )


@pytest.fixture
def dpm_solver_sde(monkeypatch):
    """Their class, which imports a package for its noise; the tests bring noise of their own."""
    if "torchsde" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return module.DPMSolverSDEScheduler


@spaced_steps
@pytest.mark.parametrize("prediction", ["eps", "v"])  # x0 they do not have
def test_dpmpp_sde(prediction, spacing, steps, x_T, noises, dpm_solver_sde):
    """Given the noise of ours: the middle's, and its right mixture with fresh noise at the end."""

    def feed(scheduler, row):
        def noise(start, end):
            if row % 2 == 0:
                return noises[row].to(start.dtype)
            start, end = start.item(), end.item()
            middle = math.sqrt(start * end)
            shared = ancestral(start, middle, 1)[1] * ancestral(middle, end, 1)[0] / middle
            share = shared / ancestral(start, end, 1)[1]
            mixture = share * noises[row - 1] + math.sqrt(1 - share**2) * noises[row]
            return mixture.to(scheduler.sigmas.dtype)

        scheduler.noise_sampler = noise

    assert_agree(
        dpm_solver_sde,
        "dpmpp-sde",
        x_T,
        noises,
        steps=steps,
        schedule=whole(spacing),
        prediction=prediction,
        before=feed,
        theirs={"timestep_spacing": spacing},
        ours={"grid": spacing},  # theirs tells the timesteps between as well
    )


@steps_10_25_50
def test_ddim_inverse(steps, x_T):
    """Of eps only: see ``test_differences``."""
    assert_agree(
        DDIMInverseScheduler,
        "ddim-inverse",
        x_T.clamp(-1, 1),  # an image
        steps=steps,
        model=lambda x, t: calm_model(x, 0.2 * t),  # with the other, x ends near 0
        theirs={"clip_sample": False},
        ours={"grid": "leading"},
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50], ids="{} steps".format)
@every_prediction
def test_lcm(prediction, steps, x_T, noises):
    scheduler, sampler = assert_agree(
        LCMScheduler,
        "lcm",
        x_T,
        noises,
        steps=steps,
        schedule="scaled_linear",
        prediction=prediction,
        ours={"grid": None},
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("thresholding", [True, False], ids=["dynamic", "static"])
def test_lcm_with_bounded_x0(thresholding, x_T, noises):
    theirs = (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
        if thresholding
        else {"clip_sample": True, "clip_sample_range": 1.5}
    )
    assert_agree(
        LCMScheduler,
        "lcm",
        x_T,
        noises,
        steps=4,
        theirs={"timestep_scaling": 1.0, **theirs},
        ours={
            "timestep_scaling": 1.0,
            "clip": (-1.5, 1.5),
            "dynamic_threshold": 0.8 if thresholding else None,
        },
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 40], ids="{} steps".format)
def test_consistency(steps, x_T, noises):
    """With the scalings of appendix C; the model's input is x / alpha, not scaled by theirs."""
    schedule = schedules.linear()
    low, high = 0.011, 80.0
    scheduler_class = CMStochasticIterativeScheduler
    with in_double(scheduler_class):
        scheduler = scheduler_class(40, sigma_min=low, sigma_max=high, clip_denoised=False)
        scheduler.set_timesteps(steps)
        ratios = scheduler.sigmas.tolist()[:-1]
        scale = iter([math.sqrt(r**2 + 0.25) for r in ratios])
        start = x_T * math.sqrt(1 + ratios[0] ** 2)
        wanted = run_diffusers(
            scheduler, start, noises, lambda x, t: timeless_model(x * next(scale), t)
        )
    points = [point_at_ratio(schedule, r) for r in ratios]
    sampler = samplers.make(
        "consistency",
        schedule,
        steps,
        grid=[point.t for point in points],
        sigma_min=low,
        sigma_data=0.5,
    )
    alphas = iter(sampler.table.levels[:, 0].tolist())
    got = run_table(sampler.table, x_T, noises, lambda x, t: timeless_model(x / next(alphas), t))
    assert worst(got[-1:], wanted[-1:]) < 1e-11
