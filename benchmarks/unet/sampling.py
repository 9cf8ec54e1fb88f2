"""Whole sampling loops: DDIM as diffusers' users write it, and ``fastdiff.sample``.

Both take the same steps from the same noise. Between the steps images are float32 for any dtype of
the network. Nothing is clipped: with random weights a clipped loop is chaotic, so that rounding
errors would grow to the size of the images within 50 steps, and no result could be checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.unet.prepared import Prepared

TRAIN_STEPS = 1000
BETAS = (1e-4, 0.02)


def with_diffusers(prepared: Prepared, x_T: Tensor, steps: int) -> Tensor:
    """A loop over diffusers' scheduler, with inputs in the network's dtype and strides."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(TRAIN_STEPS, *BETAS, "linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps:
        eps = prepared.call(*prepared.fit((x, t.repeat(len(x))))).float()
        x = scheduler.step(eps, int(t), x, return_dict=False)[0]
    return x


def with_fastdiff(prepared: Prepared, x_T: Tensor, steps: int) -> Tensor:
    """The same steps through ``fastdiff.sample``."""
    import fastdiff

    sampler = fastdiff.samplers.DDIM(
        fastdiff.schedules.linear(TRAIN_STEPS, *BETAS), steps, clip=None
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        return prepared.call(*prepared.fit((x, t)))

    return fastdiff.sample(model, sampler, x_T.shape, x_T=x_T, progress=False, dtype=torch.float32)
