"""Run an operation by a kernel or by the reference; helpers for the operations' fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.ops import profiling
from fastdiff.ops.backend import kernel_runs


def dispatch(
    x: Tensor,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    check: Callable[..., None],
    *args: Any,
) -> Any:
    """kernel(*args) if a kernel can run on ``x``, else reference(*args).

    Bad arguments raise what check(*args) raises. The check takes as long as a small kernel, and
    kernels refuse bad arguments themselves; so with a kernel it runs only after an error, for its
    better text. The profiler's range has the name of ``reference``.
    """
    if profiling.depth:
        check(*args)
        with profiling.span(reference.__name__):
            return (kernel if kernel_runs(x) else reference)(*args)
    if not kernel_runs(x):
        check(*args)
        return reference(*args)
    if torch.compiler.is_compiling():  # the check runs while tracing, not in the compiled code
        check(*args)
        return kernel(*args)
    try:
        return kernel(*args)
    except Exception:
        check(*args)
        raise


def differentiable(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that skips its Python autograd formula, 4 us, if no argument needs a gradient."""

    def call(*args: Any) -> Any:
        if recorded(*args) or torch.compiler.is_compiling():
            return kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return call


def recorded(*args: Any) -> bool:
    """Whether autograd records an operation on these arguments."""
    return torch.is_grad_enabled() and any(
        [isinstance(value, Tensor) and value.requires_grad for value in args]
    )


def refuse_to_differentiate(name: str) -> None:
    """Have autograd raise where it would differentiate ``fastdiff::<name>``, itself a gradient.

    Without this error PyTorch would treat the gradient as a constant.
    """

    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            f"fastdiff::{name} is a gradient and can itself not be differentiated: for a second "
            'derivative use PyTorch\'s eager mode, or fastdiff.backend("reference")'
        )

    torch.library.register_autograd(f"fastdiff::{name}", refuse)


def fake_like(x: Tensor, *others: Tensor | None) -> Tensor:
    """An empty result like ``x`` for a fake: channels-last if ``x`` is, else contiguous."""
    check_devices(x, *others)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """ValueError for a fake if another tensor is on another device than ``x``.

    If one argument is on the meta device, the dispatcher runs the fake in place of a kernel.
    """
    for value in others:
        if value is not None and value.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, got one on {value.device}")
