"""The ``step`` of every scheduler in fastdiff.diffusers against the class that it replaces."""

from __future__ import annotations

import pytest
import torch
from comparison import every_dtype, every_shape

pytest.importorskip("diffusers")

import diffusers

import fastdiff.diffusers

NAMES = [name for name in fastdiff.diffusers.__all__ if name.endswith("Scheduler")]
STEPS = 300  # of a run; a longer one would spend long on LMS's integrals
BLOCK = 8  # steps that are timed together, since some methods take two kinds in turn
# Distilled models' grids are drawn from another grid, which must be as long.
CONFIGS = {
    "LCMScheduler": {"original_inference_steps": STEPS},
    "TCDScheduler": {"original_inference_steps": STEPS},
}


class Steps:
    """Steps of a scheduler, one after another; at the end of a run another one begins."""

    def __init__(self, scheduler, shape, dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.scheduler, self.times = scheduler, []
        self.x = torch.randn(shape, generator=g).to(dtype)
        self.output = torch.randn(shape, generator=g).to(dtype)
        self.step = getattr(scheduler, "step", None) or scheduler.step_pred

    def begin(self) -> None:
        torch.manual_seed(0)
        self.scheduler.set_timesteps(STEPS)
        if hasattr(self.scheduler, "set_sigmas"):
            self.scheduler.set_sigmas(STEPS)
        self.times = [*self.scheduler.timesteps[:STEPS]][::-1]
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.x, self.times[-1])

    def __call__(self):
        if len(self.times) < BLOCK:
            self.begin()
        for _ in range(BLOCK):
            results = self.step(self.output, self.times.pop(), self.x, return_dict=False)
        return results


@pytest.mark.parametrize("name", NAMES)
@every_dtype
@every_shape((2, 4, 64, 64))
def bench_scheduler_steps(versus, name, shape, dtype) -> None:
    options = CONFIGS.get(name, {})
    ours, stock = (
        Steps(getattr(module, name)(**options), shape, dtype)
        for module in (fastdiff.diffusers, diffusers)
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for mine, theirs in zip(ours(), stock(), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, atol=tolerance * scale, rtol=tolerance)
    versus(ours, {"diffusers": stock}, notes=lambda comparison: {"steps": str(BLOCK)})
