"""sampler_step against the plain PyTorch expression of the same row."""

from __future__ import annotations

import pytest
import torch
from comparison import every_dtype, every_shape

from fastdiff import ops, reference, samplers, schedules

SCHEDULE = schedules.cosine()
SAMPLERS = {
    "ddim": samplers.DDIM(SCHEDULE, 50),
    "ddpm": samplers.DDPM(SCHEDULE, 50),
    "ddpm-learned": samplers.DDPM(SCHEDULE, 50, variance="learned_range"),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@every_dtype
@every_shape((16, 3, 32, 32), (8, 4, 64, 64), (64, 3, 64, 64))
def bench_sampler_step(versus, shape, dtype, sampler) -> None:
    x = torch.randn(shape).to(dtype)
    channels = shape[1] * (2 if sampler.learned_variance else 1)
    out = torch.randn(shape[0], channels, *shape[2:]).to(dtype)
    noise = torch.randn_like(x) if sampler.needs_noise else None
    arguments = (x, out, noise, sampler.table.float(), torch.tensor(20))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(
        ops.sampler_step(*arguments), reference.sampler_step(*arguments), atol=tolerance, rtol=0.02
    )
    versus(
        lambda: ops.sampler_step(*arguments), {"torch": lambda: reference.sampler_step(*arguments)}
    )
