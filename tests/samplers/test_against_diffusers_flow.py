"""Samplers on the straight path of rectified flow, beside diffusers' schedulers.

Their levels are s = (T - 1) (n - i) / (T n) for n steps, then shifted; a T of 1001 makes them those
of whole timesteps. They round what the model is told, so it does not look.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers_runs import (
    SCHEDULES,
    assert_agree,
    in_double,
    quiet,
    run_diffusers,
    scheduler_of,
    steps_10_25_50,
    timeless_model,
    worst,
)
from sampler_runs import run_table

from fastdiff import samplers

pytestmark = quiet
FLOW = SCHEDULES["flow"][0]


def visited_timesteps(steps):
    return [1000 * (steps - i) / steps - 1 for i in range(steps)]


@steps_10_25_50
@pytest.mark.parametrize(
    ("name", "scheduler_class", "options"),
    [
        pytest.param("dpmpp-2m", DPMSolverMultistepScheduler, {}, id="dpmpp-2m"),
        pytest.param(
            "dpmpp-2m-sde",
            DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++"},
            id="dpmpp-2m-sde",
        ),
        pytest.param(
            "dpmpp-1s",
            DPMSolverSinglestepScheduler,
            {"solver_order": 1, "lower_order_final": True},
            id="dpmpp-1s",
        ),
        pytest.param(
            "dpmpp-2s",
            DPMSolverSinglestepScheduler,
            {"lower_order_final": True},
            id="dpmpp-2s",
        ),
    ],
)
def test_dpmpp(name, scheduler_class, options, steps, x_T, noises):
    scheduler, sampler = assert_agree(
        scheduler_class,
        name,
        x_T,
        noises,
        steps=steps,
        schedule="flow",
        prediction="flow",
        model=timeless_model,
        theirs=options,
        ours={"grid": visited_timesteps(steps)},
    )
    assert sampler.table.levels[:, 1].tolist() == pytest.approx(scheduler.sigmas.tolist())


@steps_10_25_50
@pytest.mark.parametrize("order", [1, 2, 3], ids="order {}".format)
def test_unipc(order, steps, x_T):
    times = visited_timesteps(steps)
    assert_agree(
        UniPCMultistepScheduler,
        f"unipc-{order}",
        x_T,
        steps=steps,
        schedule="flow",
        prediction="flow",
        model=timeless_model,
        theirs={"solver_order": order},
        their_steps={"sigmas": (np.array(times) + 1) / 1001},
        ours={"grid": times},
    )


@pytest.mark.parametrize("order", [2, 3], ids="order {}".format)
def test_deis(order, x_T):
    """Theirs takes 24 of 25 steps, and stays there for the last one."""
    with in_double(DEISMultistepScheduler):
        scheduler = scheduler_of(
            DEISMultistepScheduler, 25, schedule="flow", prediction="flow", solver_order=order
        )
        *wanted, last = run_diffusers(scheduler, x_T, model=timeless_model)
    *times, end = visited_timesteps(25)
    ratio = (FLOW.sigma_t[int(end)] / FLOW.alpha_t[int(end)]).item()
    sampler = samplers.make(
        f"deis-{order}",
        FLOW,
        24,
        grid=times,
        prediction="flow",
        final="sigma_min",
        sigma_min=ratio,
    )
    got = run_table(sampler.table, x_T, model=timeless_model)
    assert worst(got, torch.stack(wanted)) < 1e-11
    torch.testing.assert_close(last, wanted[-1], rtol=1e-12, atol=1e-12)


@steps_10_25_50
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_flow_match_euler(name, steps, x_T):
    """An Euler step in s, which is one in sigma / alpha: both are exact where x0 stays."""
    assert_agree(
        FlowMatchEulerDiscreteScheduler,
        name,
        x_T,
        steps=steps,
        schedule="flow_match",
        prediction="flow",
        model=timeless_model,
        ours={"grid": "linspace"} | ({"clip": None} if name == "ddim" else {}),
    )
