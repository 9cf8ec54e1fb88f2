"""Samplers on the straight path of rectified flow, beside diffusers' schedulers.

The levels of their multistep schedulers are s = (T - 1) (n - i) / (T n) for n steps, then shifted;
a T of 1001 makes them those of whole timesteps. They round what the model is told, so it does not
look. That of flow matching does not round, and its model is told the same as ours.
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
    calm_model,
    in_double,
    quiet,
    run_diffusers,
    scheduler_of,
    steps_10_25_50,
    timeless_model,
    worst,
)
from sampler_runs import run_table

from fastdiff import Diffusion, losses, sample, samplers, schedules, sde
from fastdiff.samplers.grids import point_at_ratio

pytestmark = quiet
FLOW = SCHEDULES["flow"][0]
IN_RATIOS = (
    "plms", "heun", "kdpm-2", "dpm-1", "dpm-2", "dpm-3", "dpm-2-ancestral", "dpm-fast",
    "dpmpp-2s-ancestral", "dpmpp-sde", "deis-2", "deis-3", "lms",
)  # fmt: skip


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
        ours={"grid": "linspace"} | ({"clip": None} if name == "ddim" else {}),
    )


@pytest.mark.parametrize("shift", [1.0, 3.0], ids="shift {}".format)
def test_a_network_is_told_t_times_the_shifted_noise(shift, x_T):
    """Networks of Stable Diffusion 3's kind, at the levels that diffusers visits."""
    with in_double(FlowMatchEulerDiscreteScheduler):
        scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
        scheduler.set_timesteps(28)
        wanted = run_diffusers(scheduler, x_T)
    path = schedules.flow(1000, shift=shift)
    ratios = [(s / (1 - s)).item() for s in scheduler.sigmas[1:-1].double()]
    grid = [999.0, *(point_at_ratio(path, ratio).t for ratio in ratios)]
    sampler = samplers.make("euler", path, 28, prediction="flow", grid=grid)
    torch.testing.assert_close(sampler.timesteps, scheduler.timesteps.double(), rtol=1e-6, atol=0)
    if shift == 3:
        told = sampler.timesteps[:4].tolist()
        assert told == pytest.approx([1000, 987.4, 974.1, 960.1], abs=0.05)
    assert worst(run_table(sampler.table, x_T, model=calm_model), wanted) < 1e-6


@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_tells_the_noise_of_its_row(name):
    """The inversion asks at the level that its row leads to."""
    grid = {"grid": "leading"} if name in IN_RATIOS else {}  # they cannot begin without signal
    path = schedules.flow(1000, shift=3.0)
    table = samplers.make(name, path, 28, prediction="flow", **grid).table
    wanted = table.levels[1:, 1] if name == "ddim-inverse" else table.levels[:-1, 1]
    torch.testing.assert_close(table.timesteps, 1000 * wanted, rtol=1e-9, atol=1e-9)


def test_training_and_samplers_and_solvers_tell_the_same():
    path, told = schedules.flow(1000, shift=3.0), {}

    def model(name):
        def network(x, t):
            told.setdefault(name, []).extend(t.double().tolist())
            return torch.zeros_like(x)

        return network

    sampler = samplers.make("euler", path, 1000, prediction="flow")
    x0, t = torch.zeros(1000, 1), torch.arange(1000).flip(0)
    sample(model("sampler"), sampler, (1, 1), progress=False)
    losses.simple_loss(path, model("loss"), x0, t, x0, kind="flow")
    view = sde.continuous(path)
    times = path.sigma_t[t][5:]  # those up to the end of the view, 0.999
    sde.score_fn(model("score"), "flow", view)(x0[5:], times)
    diffusion = Diffusion(model("diffusion"), path, "flow")
    diffusion.score()(x0[5:], times)
    assert told["loss"] == told["sampler"]
    assert told["score"] == told["diffusion"]
    assert told["score"] == pytest.approx(told["sampler"][5:], rel=1e-6)
