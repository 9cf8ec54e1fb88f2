"""Who computes an operation, a kernel or the reference, and what a fake of it gives."""

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
    """kernel(*args) where a kernel can run on ``x``, else reference(*args), which names the range.

    Bad arguments raise what check(*args) raises. A kernel refuses them by itself, so there the
    check runs only afterwards, to say it better: it would take as long as a small kernel does.
    """
    if profiling.depth:
        check(*args)
        with profiling.span(reference.__name__):
            return (kernel if kernel_runs(x) else reference)(*args)
    if not kernel_runs(x):
        check(*args)
        return reference(*args)
    if torch.compiler.is_compiling():  # traced: the check costs nothing when it runs
        check(*args)
        return kernel(*args)
    try:
        return kernel(*args)
    except Exception:
        check(*args)
        raise


def differentiable(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel with a Python autograd formula, without the 4 us of it where nothing needs it."""

    def call(*args: Any) -> Any:
        needed = torch.is_grad_enabled() and _requires_grad(args)
        if needed or torch.compiler.is_compiling():
            return kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return call


def _requires_grad(args: tuple[Any, ...]) -> bool:
    return any([isinstance(value, Tensor) and value.requires_grad for value in args])


def fake_like(x: Tensor, *others: Tensor | None) -> Tensor:
    """An empty result like ``x`` for a fake: channels-last if ``x`` is, else contiguous."""
    check_devices(x, *others)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """ValueError for a fake if another tensor is on another device than ``x``.

    Beside a meta tensor the dispatcher would have the fake answer for a kernel.
    """
    for value in others:
        if value is not None and value.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, got one on {value.device}")
