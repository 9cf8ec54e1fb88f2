"""``add_noise`` of diffusers' schedulers: fastdiff's classes against diffusers' own.

In training every image has a timestep of its own. In a run that starts from a noised image, as
inpainting does at every step, all images have the level of one step.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from comparison import every_dtype

from fastdiff import diffusers as ours

SHAPE = (16, 4, 32, 32)
NAMES = ("DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")


def compare(versus, mine, stock, arguments) -> None:
    result, wanted = mine.add_noise(*arguments), stock.add_noise(*arguments)
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 0.02
    torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)
    peers = {"diffusers": lambda: stock.add_noise(*arguments)}
    versus(lambda: mine.add_noise(*arguments), peers)


@pytest.mark.parametrize("name", NAMES)
@every_dtype
def bench_add_noise_in_training(versus, name, dtype) -> None:
    mine, stock = getattr(ours, name)(), getattr(diffusers, name)()
    x0, noise = torch.randn(2, *SHAPE).to(dtype)
    t = stock.timesteps[torch.randint(1000, SHAPE[:1])]
    versus(
        lambda: mine.add_noise(x0, noise, t), {"diffusers": lambda: stock.add_noise(x0, noise, t)}
    )


@pytest.mark.parametrize("name", NAMES)
@every_dtype
def bench_add_noise_in_a_run(versus, name, dtype) -> None:
    mine, stock = getattr(ours, name)(), getattr(diffusers, name)()
    for scheduler in (mine, stock):
        scheduler.set_timesteps(20)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(5)
    x0, noise = torch.randn(2, *SHAPE).to(dtype)
    t = stock.timesteps[5:6]
    versus(
        lambda: mine.add_noise(x0, noise, t), {"diffusers": lambda: stock.add_noise(x0, noise, t)}
    )
