"""How the operations are judged: against float64, beside plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_IDS = ("f32", "bf16", "f16", "f64")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
LAYOUT_IDS = ("nchw", "nhwc")


def assert_as_accurate(
    call: Callable[..., Sequence[Tensor]], *arguments: Tensor | None, cancelling: bool = False
) -> None:
    """Hold call(*arguments) on the kernels to twice the error of the reference in the same dtype.

    The oracle is the reference in float64 on the same values, channels-first: channels-last,
    PyTorch subtracts E[x]^2 from E[x^2], which costs digits even in float64. Two units in the last
    place of the output's largest value are always allowed; where outputs may be sums that cancel
    (``cancelling``), four of the largest value of any output.
    """
    with fastdiff.backend("cpu"):
        ours = call(*arguments)
    assert_no_worse(ours, call, arguments, cancelling)


def assert_no_worse(
    ours: Sequence[Tensor],
    call: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    cancelling: bool = False,
) -> None:
    """Hold results to the errors of call(*arguments) on the reference, as above."""
    with fastdiff.backend("reference"):
        same = call(*arguments)
        oracle = call(*(_double(value) for value in arguments))
    sizes = [c.abs().max().item() if c.numel() else 0.0 for c in oracle]
    for index, (a, b, c) in enumerate(zip(ours, same, oracle, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, c.shape), index
        unit = torch.finfo(a.dtype).eps * (2 * max(sizes) if cancelling else sizes[index])
        if a.dtype == torch.float64:  # which has no better oracle than itself
            unit = 1e-12 * (1 + sizes[index])
        error, theirs = _distance(a, c), _distance(b, c)
        assert error <= 2 * theirs + 2 * unit, (
            f"output {index}: error {error:.3g}, PyTorch's {theirs:.3g}, unit {unit:.3g}"
        )


def _double(value: Tensor | None) -> Tensor | None:
    if value is None or not value.is_floating_point():
        return value
    return value.detach().double().contiguous().requires_grad_(value.requires_grad)


def _distance(a: Tensor, b: Tensor) -> float:
    assert bool(torch.isfinite(a).all())
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def amid_nans(value: Tensor) -> Tensor:
    """The value with NaNs before and behind it, in memory as it was."""
    memory = torch.full((value.numel() + 2 * 64,), torch.nan, dtype=value.dtype)
    return memory.as_strided(value.shape, value.stride(), 64).copy_(value)


class CountCalls(TorchDispatchMode):
    """Counts the calls that reach PyTorch's dispatcher, views and metadata included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
