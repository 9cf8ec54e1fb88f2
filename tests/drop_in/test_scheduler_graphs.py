"""Steps of the schedulers inside torch.compile: one graph, compiled once, for a whole run."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("diffusers")

from scheduler_runs import SHAPE, pair

import fastdiff.diffusers

NAMES = [name for name in fastdiff.diffusers.__all__ if name.endswith("Scheduler")]
STEPS = 5


def runs(
    name, backend="eager", options=None, numbers=False, dtype=torch.float32, return_dict=False
):
    """The last results of a run of ours, compiled, and of diffusers' class; how often it compiled.

    Args:
        name: of the scheduler.
        backend: of torch.compile.
        options: arguments of the step.
        numbers: whether times are given as numbers, not tensors.
        dtype: of the images.
        return_dict: of the step.
    """
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    found = []
    for one in pair(name):
        one.set_timesteps(STEPS)
        if hasattr(one, "set_sigmas"):
            one.set_sigmas(STEPS)
        step = one.step_pred if name == "ScoreSdeVeScheduler" else one.step
        ours = type(one).__module__.startswith("fastdiff")

        def call(x, t, step=step):
            made = step(x.tanh(), t, 0.9 * x, return_dict=return_dict, **(options or {}))
            return made[0] * 0.5, made[-1] + 1

        if ours:
            call = torch.compile(call, fullgraph=True, backend=counter)
        torch.manual_seed(0)
        x = torch.randn(SHAPE).to(dtype)
        for t in one.timesteps.tolist() if numbers else one.timesteps:
            one.is_scale_input_called = True  # as a pipeline has it
            x, last = call(x, t)
        found.append((x, last))
    return *found, counter.frame_count


def assert_near(ours, stock) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, atol=1e-4 * size, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_steps_are_one_graph(name) -> None:
    ours, stock, count = runs(name)
    assert_near(ours, stock)
    assert count == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("HeunDiscreteScheduler", {"backend": "aot_eager"}),
        ("DDPMScheduler", {"backend": "aot_eager", "return_dict": True}),
        ("DDIMScheduler", {"options": {"eta": 0.5, "use_clipped_model_output": True}}),
        ("LMSDiscreteScheduler", {"options": {"order": 3}}),
        ("UniPCMultistepScheduler", {"dtype": torch.float64}),
    ],
)
def test_functional_graphs_and_options(name, arguments) -> None:
    ours, stock, count = runs(name, **arguments)
    assert_near(ours, stock)
    assert count == 1


def test_times_that_are_numbers_compile_once_more() -> None:
    ours, stock, count = runs("DDPMScheduler", numbers=True)
    assert_near(ours, stock)
    assert count == 2  # a number that changes becomes a symbol


@pytest.mark.parametrize("gradient", [False, True], ids=["table", "diffusers"])
def test_a_graph_may_write_to_what_a_step_has_read(gradient) -> None:
    """A compiled graph uses the memory of a step's inputs again, as soon as the step has run."""
    results = []
    for spoil in (False, True):
        one, _ = pair("HeunDiscreteScheduler")
        one.set_timesteps(4)
        numbers = torch.Generator().manual_seed(0)
        for t in one.timesteps[:2]:
            x, output = (torch.randn(SHAPE, generator=numbers) for _ in range(2))
            one.scale_model_input(x, t)
            with torch.enable_grad():
                made = one._opaque_step(output, t, x.requires_grad_(gradient), (), None)
            with torch.no_grad():
                if spoil:
                    x.zero_()
                    output.zero_()
        results.append(made)
    torch.testing.assert_close(*results, atol=0, rtol=0)
