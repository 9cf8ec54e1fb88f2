"""The scheduler that ``accelerate`` puts in the place of diffusers', and what goes back."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
import unconditional

import fastdiff
from fastdiff.acceleration import report

NAMES = (
    "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def steps(scheduler: Any, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """A run with a model that a few operations make up for."""
    for t in times:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(2 * scaled), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on(name):
    """A scheduler that is replaced in the middle of a run has the state of the first half."""
    pipe = unconditional.ddim()
    pipe.scheduler = getattr(diffusers, name)()
    pipe.scheduler.set_timesteps(8)
    times = pipe.scheduler.timesteps
    x = torch.randn(1, 3, 8, 8) * pipe.scheduler.init_noise_sigma
    expected = steps(copy.deepcopy(pipe.scheduler), x, times)
    half = steps(pipe.scheduler, x, times[:4])
    original, state = pipe.scheduler, copy.deepcopy(pipe.scheduler)
    fastdiff.accelerate(pipe)
    assert type(pipe.scheduler) is not type(original)
    assert isinstance(pipe.scheduler, type(original))
    assert pipe.scheduler.config == original.config
    found = steps(pipe.scheduler, half, times[4:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fastdiff.restore(pipe)
    assert pipe.scheduler is original
    torch.testing.assert_close(steps(original, half, times[4:]), expected, rtol=0, atol=0)
    torch.testing.assert_close(steps(state, half, times[4:]), expected, rtol=0, atol=0)


class MyScheduler(diffusers.DDIMScheduler):
    """A scheduler of one's own, whose step may be another."""


@pytest.mark.parametrize("kind", [MyScheduler, diffusers.CMStochasticIterativeScheduler])
def test_a_scheduler_without_a_counterpart_is_left_by_name(kind):
    pipe = unconditional.ddim()
    pipe.scheduler = kind()
    given = pipe.scheduler
    fastdiff.accelerate(pipe)
    assert pipe.scheduler is given
    row = report(pipe).rows[-1]
    assert (row.component, row.kind) == ("scheduler", kind.__name__)
    assert "no scheduler of its class" in row.left
    fastdiff.restore(pipe)


def test_a_scheduler_of_fastdiff_stays():
    pipe = unconditional.ddim()
    mine = fastdiff.diffusers.DDIMScheduler()
    pipe.scheduler = mine
    fastdiff.accelerate(pipe)
    assert pipe.scheduler is mine
    assert "as it was given" in report(pipe).rows[-1].done
    fastdiff.restore(pipe)
    assert pipe.scheduler is mine


def test_an_accelerated_pipeline_saves_the_stock_one(tmp_path):
    pipe = fastdiff.accelerate(unconditional.ddim())
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert type(loaded.unet) is diffusers.UNet2DModel
    assert loaded.scheduler.config.items() >= {
        (key, value)
        for key, value in pipe.scheduler.config.items()
        if not key.startswith("_") and not isinstance(value, list)
    }
