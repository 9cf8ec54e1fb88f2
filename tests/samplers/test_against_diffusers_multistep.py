"""Samplers that use earlier evaluations, run beside diffusers' schedulers.

Both visit the same timesteps. What the two do differently on purpose is in ``test_differences``.
"""

from __future__ import annotations

import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers_runs import (
    assert_agree,
    both_solvers,
    every_prediction,
    every_spacing,
    quiet,
    spaced_steps,
    steps_10_25_50,
    timeless_model,
    uneven_levels,
)

pytestmark = quiet


@steps_10_25_50
@every_spacing
@every_prediction
@both_solvers
def test_dpmpp_2m(solver_type, prediction, spacing, steps, x_T):
    assert_agree(
        DPMSolverMultistepScheduler,
        "dpmpp-2m",
        x_T,
        steps=steps,
        prediction=prediction,
        theirs={"timestep_spacing": spacing, "solver_type": solver_type},
        ours={"solver_type": solver_type},
    )


@steps_10_25_50
@every_spacing
@every_prediction
@both_solvers
def test_dpmpp_2m_sde(solver_type, prediction, spacing, steps, x_T, noises):
    assert_agree(
        DPMSolverMultistepScheduler,
        "dpmpp-2m-sde",
        x_T,
        noises,
        steps=steps,
        prediction=prediction,
        theirs={
            "algorithm_type": "sde-dpmsolver++",
            "timestep_spacing": spacing,
            "solver_type": solver_type,
        },
        ours={"solver_type": solver_type},
    )


@pytest.mark.parametrize("lower", [True, False], ids=["lower", "full"])
@pytest.mark.parametrize("steps", [2, 14, 15], ids="{} steps".format)
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        pytest.param("dpmpp-2m", "dpmsolver++", id="ode"),
        pytest.param("dpmpp-2m-sde", "sde-dpmsolver++", id="sde"),
    ],
)
def test_the_last_step_of_dpmpp_2m(name, algorithm, steps, lower, x_T, noises):
    """Of first order in fewer than 15 steps, if wanted."""
    assert_agree(
        DPMSolverMultistepScheduler,
        name,
        x_T,
        noises,
        steps=steps,
        theirs={
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "final_sigmas_type": "sigma_min",
        },
        ours={"lower_order_final": None if lower else False, "final": "sigma_min"},
    )


@uneven_levels
@every_prediction
def test_dpmpp_2m_on_levels_between_timesteps(prediction, grid, x_T):
    scheduler, sampler = assert_agree(
        DPMSolverMultistepScheduler,
        "dpmpp-2m",
        x_T,
        steps=25,
        prediction=prediction,
        model=timeless_model,
        theirs={f"use_{grid}_sigmas": True},
        ours={"grid": grid},
    )
    assert [point.ratio for point in sampler.points] == pytest.approx(scheduler.sigmas.tolist())
    assert sampler.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        pytest.param("dpmpp-2m", DPMSolverMultistepScheduler, id="dpmpp-2m"),
        pytest.param("unipc-2", UniPCMultistepScheduler, id="unipc-2"),
    ],
)
def test_other_schedules(name, scheduler_class, schedule, x_T):
    """Of v: x0 from eps is off by 1e-4 where cosine has next to no signal, in float32."""
    assert_agree(scheduler_class, name, x_T, steps=25, schedule=schedule, prediction="v")


@pytest.mark.parametrize("largest", [1.0, 1.5], ids="at most {}".format)
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        pytest.param("dpmpp-2m", DPMSolverMultistepScheduler, id="dpmpp-2m"),
        pytest.param("unipc-2", UniPCMultistepScheduler, id="unipc-2"),
        pytest.param("deis-2", DEISMultistepScheduler, id="deis-2"),
    ],
)
def test_dynamic_threshold(name, scheduler_class, largest, x_T):
    final = {"final": "sigma_min"} if name == "deis-2" else {}
    assert_agree(
        scheduler_class,
        name,
        x_T,
        steps=10,
        theirs={
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.8,
            "sample_max_value": largest,
        },
        ours={"dynamic_threshold": 0.8, "clip": (-largest, largest), **final},
    )


unipc_solvers = pytest.mark.parametrize(
    ("solver_type", "final"),
    [
        pytest.param("bh1", "sigma_min", id="bh1-sigma_min"),  # to zero, theirs is NaN
        pytest.param("bh2", "sigma_min", id="bh2-sigma_min"),
        pytest.param("bh2", "zero", id="bh2-zero"),
    ],
)


@spaced_steps
@every_prediction
@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
@unipc_solvers
def test_unipc(solver_type, final, order, prediction, spacing, steps, x_T):
    assert_agree(
        UniPCMultistepScheduler,
        f"unipc-{order}",
        x_T,
        steps=steps,
        prediction=prediction,
        theirs={
            "timestep_spacing": spacing,
            "solver_type": solver_type,
            "solver_order": order,
            "final_sigmas_type": final,
        },
        ours={"solver_type": solver_type, "final": final},
    )


@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
def test_unipc_without_some_corrections(order, x_T):
    options = {"disable_corrector": [0, 1, 5], "lower_order_final": False}
    assert_agree(
        UniPCMultistepScheduler,
        f"unipc-{order}",
        x_T,
        steps=10,
        theirs={"solver_order": order, "final_sigmas_type": "sigma_min", **options},
        ours={"final": "sigma_min", **options},
    )


@uneven_levels
@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
def test_unipc_on_levels_between_timesteps(order, grid, x_T):
    scheduler, sampler = assert_agree(
        UniPCMultistepScheduler,
        f"unipc-{order}",
        x_T,
        steps=25,
        model=timeless_model,
        theirs={"solver_order": order, f"use_{grid}_sigmas": True},
        ours={"grid": grid},
    )
    assert [point.ratio for point in sampler.points] == pytest.approx(scheduler.sigmas.tolist())


@spaced_steps
@every_prediction
@pytest.mark.parametrize("order", [2, 3], ids="order {}".format)
def test_deis(order, prediction, spacing, steps, x_T):
    assert_agree(
        DEISMultistepScheduler,
        f"deis-{order}",
        x_T,
        steps=steps,
        prediction=prediction,
        theirs={"timestep_spacing": spacing, "solver_order": order},
        ours={"final": "sigma_min"},
    )


@spaced_steps
@every_prediction
def test_lms(prediction, spacing, steps, x_T):
    assert_agree(
        LMSDiscreteScheduler,
        "lms",
        x_T,
        steps=steps,
        schedule="fine" if spacing == "linspace" else "linear",
        prediction=prediction,
        theirs={"timestep_spacing": spacing},
    )


@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
def test_lms_of_lower_order(order, x_T):
    assert_agree(
        LMSDiscreteScheduler,
        "lms",
        x_T,
        steps=10,
        step_options={"order": order},
        ours={"order": order},
        theirs={"timestep_spacing": "trailing"},
    )


@uneven_levels
def test_lms_on_levels_between_timesteps(grid, x_T):
    scheduler, sampler = assert_agree(
        LMSDiscreteScheduler,
        "lms",
        x_T,
        steps=25,
        theirs={f"use_{grid}_sigmas": True},
        ours={"grid": grid},
    )
    assert [point.ratio for point in sampler.points] == pytest.approx(scheduler.sigmas.tolist())
    assert sampler.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-9)


def next_visited(scheduler, row):
    """Have their PLMS step to the grid's next timestep, and not to t - T // n."""
    timesteps = scheduler.timesteps.tolist()
    del timesteps[1]  # the first step's second evaluation
    step = max(row - 1, 0)
    following = [*timesteps[1:], -1]
    gap = timesteps[step] - following[step]
    scheduler.register_to_config(num_train_timesteps=gap * len(timesteps))


@steps_10_25_50
@pytest.mark.parametrize(
    ("spacing", "offset"),
    [
        pytest.param("leading", 0, id="leading"),
        pytest.param("leading", 1, id="leading-offset"),
        pytest.param("trailing", 0, id="trailing"),
        pytest.param("linspace", 0, id="linspace"),
    ],
)
def test_plms(spacing, offset, steps, x_T):
    """Of eps only: they take the mean of v, which is not that of eps; x0 they do not have."""
    assert_agree(
        PNDMScheduler,
        "plms",
        x_T,
        steps=steps,
        before=None if spacing == "leading" and not offset else next_visited,
        theirs={
            "skip_prk_steps": True,
            "set_alpha_to_one": True,
            "timestep_spacing": spacing,
            "steps_offset": offset,
        },
    )


def test_plms_as_stable_diffusion_has_it(x_T):
    """It ends at the first abar."""
    assert_agree(
        PNDMScheduler,
        "plms",
        x_T,
        steps=25,
        schedule="scaled_linear",
        before=next_visited,
        theirs={"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
        ours={"final": "sigma_min"},
    )
