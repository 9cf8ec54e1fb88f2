"""A pipeline whose U-Net is compiled, beside the same pipeline in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_pipelines import arguments
from torch import Tensor

import fastdiff
from fastdiff.compiler.run.replay import Replay

FAST = 1e-4  # of a U-Net's output: what float32 may cost with Winograd's transforms
STEPS = 2


class SideBySide:
    """Runs a pipeline compiled and in eager mode, and compares the latents.

    Args:
        pipe: its U-Net is compiled in place; a graph break is an error.
        bound: of the largest difference, as a share of the largest latent.
        accelerated: whether ``fastdiff.accelerate`` compiles the pipeline instead, its ControlNet
            too.
    """

    def __init__(self, pipe: Any, bound: float = 10 * FAST, *, accelerated: bool = False) -> None:
        self.pipe, self.bound, self.last = pipe, bound, None
        self.networks = 1
        if accelerated:
            fastdiff.accelerate(pipe, scheduler=False)
            self.networks += hasattr(pipe, "controlnet")
        else:
            pipe.unet.compile(backend="fastdiff", fullgraph=True)

    def __call__(self, *, changed: bool = True, **changes: Any) -> Tensor:
        """The latents, which are eager's. Every evaluation of a network ran as one fused graph.

        Args:
            changed: whether they are other latents than those of the call before, or the same.
            changes: arguments of the pipeline.
        """
        given = {"output_type": "latent", "steps": STEPS, **changes}
        with torch.compiler.set_stance("force_eager"):
            expected = self.pipe(**arguments(**given)).images
        ran, found = fused_runs(lambda: self.pipe(**arguments(**given)).images)
        assert ran == given["steps"] * self.networks
        assert_close(found, expected, self.bound)
        if self.last is not None:
            assert (distance(found, self.last) > 3 * self.bound) == changed
        self.last = found
        return found


def fused_runs(function: Callable[[], Any]) -> tuple[int, Any]:
    """How many fused graphs ran while a function was called, and its result."""
    runs, call = 0, Replay.__call__

    def counted(self: Replay, *inputs: Any) -> Any:
        nonlocal runs
        runs += 1
        return call(self, *inputs)

    Replay.__call__ = counted  # type: ignore[method-assign]
    try:
        result = function()
    finally:
        Replay.__call__ = call  # type: ignore[method-assign]
    return runs, result


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value; 1 where the sizes differ."""
    if a.shape != b.shape:
        return 1.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert bool(torch.isfinite(found).all())
    assert distance(found, expected) <= bound, distance(found, expected)


def graphs() -> int:
    """How many graphs Dynamo has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
