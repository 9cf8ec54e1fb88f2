"""The cost of sampling apart from the model: fastdiff.sample against diffusers' scheduler loop.

The model returns its input at no cost, so all that is timed is the rest of each step. Both loops
take the same steps on the same images; for both, the number of calls that reach PyTorch's
dispatcher in one step is printed. In fastdiff's loop the first steps are slower, since the caches
hold the peer's code and data; they are a large share of 50 steps, and a small share of 250.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import CountCalls

import fastdiff
from fastdiff import samplers, schedules

diffusers = pytest.importorskip("diffusers")

SHAPE = (4, 3, 32, 32)
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "unipc-2": (diffusers.UniPCMultistepScheduler, {}),
}


def free(x, t):
    return x


@pytest.mark.parametrize("steps", [50, 250], ids="{} steps".format)
@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def bench_sampling_loop(versus, name, steps) -> None:
    kind, options = SCHEDULERS[name]
    scheduler = kind(beta_schedule="linear", **options)
    scheduler.set_timesteps(steps)
    sampler = samplers.make(
        name, schedules.linear(), steps, grid=scheduler.timesteps.double(), clip=None
    )
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def ours(sampler=sampler):
        seeded = torch.Generator().manual_seed(0)
        return fastdiff.sample(free, sampler, SHAPE, x_T=x_T, generator=seeded, progress=False)

    def theirs(count=steps):
        seeded = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)  # also resets the scheduler's state
        x = x_T * scheduler.init_noise_sigma
        extra = {} if name in ("dpmpp-2m", "unipc-2") else {"generator": seeded}
        for t in scheduler.timesteps[:count]:
            out = free(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **extra).prev_sample
        return x

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    ten, twenty = (sampler.starting_at(steps - count) for count in (10, 20))
    calls = {  # calls of twenty steps minus calls of ten, without those before and after the loop
        "fastdiff": (_calls(ours, twenty) - _calls(ours, ten)) / 10,
        "diffusers": (_calls(theirs, 20) - _calls(theirs, 10)) / 10,
    }
    versus(
        ours,
        {"diffusers": theirs},
        notes=lambda comparison: {
            "us a step": f"{comparison.ours / steps * 1e6:.1f}",
            "dispatcher calls": f"{calls['fastdiff']:g} and {calls['diffusers']:g}",
        },
    )


def _calls(run, argument) -> int:
    with CountCalls() as counted:
        run(argument)
    return len(counted.names)
