"""The cost of sampling beside the model: fastdiff.sample and diffusers' scheduler loop.

The model is free (it returns its input), so what is timed is everything else that a step costs.
Both loops take the same steps on the same images; the calls that reach PyTorch's dispatcher in one
step are printed for both.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import CountCalls

import fastdiff
from fastdiff import samplers, schedules

diffusers = pytest.importorskip("diffusers")

SHAPE, STEPS = (4, 3, 32, 32), 50
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "unipc-2": (diffusers.UniPCMultistepScheduler, {}),
}


def free(x, t):
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def bench_sampling_loop(versus, name) -> None:
    kind, options = SCHEDULERS[name]
    scheduler = kind(beta_schedule="linear", **options)
    scheduler.set_timesteps(STEPS)
    sampler = samplers.make(
        name, schedules.linear(), STEPS, grid=scheduler.timesteps.double(), clip=None
    )
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    shorter = {steps: sampler.starting_at(STEPS - steps) for steps in (10, 20, STEPS)}

    def ours(steps=STEPS):
        seeded = torch.Generator().manual_seed(0)
        return fastdiff.sample(
            free, shorter[steps], SHAPE, x_T=x_T, generator=seeded, progress=False
        )

    def theirs(steps=STEPS):
        seeded = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(STEPS)  # which begins anew
        x = x_T * scheduler.init_noise_sigma
        extra = {} if name in ("dpmpp-2m", "unipc-2") else {"generator": seeded}
        for t in scheduler.timesteps[:steps]:
            out = free(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **extra).prev_sample
        return x

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    calls = {}
    for who, run in {"fastdiff": ours, "diffusers": theirs}.items():
        counts = []
        for steps in (10, 20):  # the difference is ten steps, whatever comes before and after
            with CountCalls() as counted:
                run(steps)
            counts.append(len(counted.names))
        calls[who] = (counts[1] - counts[0]) / 10
    versus(
        ours,
        {"diffusers": theirs},
        notes=lambda found: [
            f"{found.ours / STEPS * 1e6:.1f} us a step",
            f"dispatcher calls a step: {calls['fastdiff']:g} and {calls['diffusers']:g}",
        ],
    )
