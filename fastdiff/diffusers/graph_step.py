"""A scheduler's step as one operation, which ``torch.compile`` puts into a graph as it is.

Traced, a step would read where its run is, which changes in every step: each step would be compiled
anew. So a graph has a call of ``fastdiff::scheduler_step``, which steps the scheduler when the
graph runs. The operation takes the scheduler as the number ``id`` gives: Dynamo compiles again for
another scheduler, and not for another step of the same.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch.library import _register_effectful_op
from torch.utils._python_dispatch import _disable_current_modes

_SCHEDULERS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by id

torch.library.define(
    "fastdiff::scheduler_step",
    "(Tensor model_output, Tensor? time, SymInt? number, Tensor sample, Scalar[] options, "
    "Tensor? noise, int scheduler) -> Tensor[]",
)
# Steps follow one another: none may be left out, moved past another or replaced by an equal one.
_register_effectful_op("fastdiff::scheduler_step", EffectType.ORDERED)
_operation = torch.ops.fastdiff.scheduler_step.default


def register(scheduler: Any) -> None:
    """Let the operation find a scheduler, for as long as it lives."""
    _SCHEDULERS[id(scheduler)] = scheduler


def graph_step(
    scheduler: Any,
    output: Tensor,
    time: Any,
    sample: Tensor,
    options: tuple[Any, ...],
    noise: Tensor | None,
) -> tuple[Tensor, ...]:
    """A step as a call in the graph that is being traced."""
    tensor, number = (time, None) if isinstance(time, Tensor) else (None, time)
    return tuple(_operation(output, tensor, number, sample, [*options], noise, id(scheduler)))


def fits_graph(
    output: Tensor, time: Any, sample: Tensor, generator: Any, noise: Tensor | None
) -> bool:
    """Whether a step can be a call in a graph.

    Dynamo takes no generator to a graph, a float there is a constant, and gradients go through
    diffusers' own step. Then the graph breaks, and the step runs between its parts.
    """
    tensors = [output, sample] if noise is None else [output, sample, noise]
    return (
        generator is None
        and isinstance(time, (Tensor, int))
        and sample.dtype == output.dtype
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


@torch.library.impl("fastdiff::scheduler_step", "CompositeExplicitAutograd")
def _step(
    output: Tensor,
    time: Tensor | None,
    number: int | None,
    sample: Tensor,
    options: list[Any],
    noise: Tensor | None,
    scheduler: int,
) -> list[Tensor]:
    made = _SCHEDULERS[scheduler]._opaque_step(
        output, number if time is None else time, sample, tuple(options), noise
    )
    # laid out as promised to the graph, and apart from the step's inputs
    like = torch.empty_like(sample, device="meta").stride()
    return [
        one if one.stride() == like else torch.empty_like(sample, dtype=one.dtype).copy_(one)
        for one in made
    ]


@torch.library.register_fake("fastdiff::scheduler_step")
def _fake(
    output: Tensor,
    time: Tensor | None,
    number: int | None,
    sample: Tensor,
    options: list[Any],
    noise: Tensor | None,
    scheduler: int,
) -> list[Tensor]:
    with _disable_current_modes():  # the scheduler's own tensors are real
        dtypes = _SCHEDULERS[scheduler]._result_dtypes(
            sample.dtype, (sample.shape[1], output.shape[1]), tuple(options)
        )
    return [torch.empty_like(sample, dtype=dtype) for dtype in dtypes]
