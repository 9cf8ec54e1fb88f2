"""How the operations are judged: against float64, by what their own arithmetic can explain."""

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
    call: Callable[..., Sequence[Tensor]],
    *arguments: Tensor | None,
    cancelling: bool = False,
    terms: int = 1,
    formula: float = 0.0,
) -> None:
    """Hold call(*arguments) on the CPU's kernels to the bounds of :func:`assert_accurate`."""
    with fastdiff.backend("cpu"):
        found = call(*arguments)
    assert_accurate(found, call, arguments, cancelling, terms, formula)


def assert_accurate(
    found: Sequence[Tensor],
    call: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    cancelling: bool = False,
    terms: int = 1,
    formula: float = 0.0,
) -> None:
    """Hold results to twice the error that the arithmetic's precision explains, on any processor.

    The oracle is the reference in float64 on the same values, channels-first: channels-last,
    PyTorch subtracts E[x]^2 from E[x^2], which costs digits even in float64. Precision explains

    - a unit in the last place of the largest value of an output, for storing it;
    - what changes in it where each number of the arguments moves by a unit of the arithmetic
      (float32, or float64): the backward error, which grows with the problem's condition;
    - sqrt(terms) / 6 units of the arithmetic for sums of that many ``terms`` of one sign, each
      addition of which rounds the sum so far by a random part of half a unit (root mean square);
    - where outputs may be sums that all but cancel (``cancelling``), two units of the arithmetic of
      the largest value of any output;
    - ``formula``, the error of the approximation that a kernel computes, as its source states it.

    What PyTorch's own kernels make of the same arguments is no part of it: their order of summation
    differs from one processor to another.
    """
    with fastdiff.backend("reference"):
        dtypes = [value.dtype for value in call(*arguments)]
        oracle = call(*map(_double, arguments))
    sizes = [_largest(value) for value in oracle]
    moved: list[float] = []
    for index, (a, c) in enumerate(zip(found, oracle, strict=True)):
        assert (a.dtype, a.shape) == (dtypes[index], c.shape), index
        eps = _eps(a.dtype)
        explained = torch.finfo(a.dtype).eps * sizes[index] + eps * sizes[index] * terms**0.5 / 6
        explained += formula + (2 * eps * max(sizes) if cancelling else 0.0)
        if a.dtype == torch.float64:  # which has no better oracle than itself
            explained = 1e-12 * (1 + sizes[index])
        error = _distance(a, c)
        if error > 2 * explained:
            moved = moved or _moved(call, arguments, oracle)
            explained += moved[index]
        assert error <= 2 * explained, f"output {index}: {error:.3g}, explained {explained:.3g}"


def upstream(x: Tensor) -> Tensor:
    """A gradient of an output of x's shape and dtype, to be passed to ``call`` with the others."""
    return torch.arange(x.numel(), dtype=torch.float64).sin().view(x.shape).to(x.dtype)


def _moved(call: Callable, arguments: Sequence[Tensor | None], oracle: list[Tensor]) -> list[float]:
    """How far each output goes where each number moves up or down by a unit of the arithmetic."""
    g = torch.Generator().manual_seed(0)
    most = [0.0] * len(oracle)
    with fastdiff.backend("reference"):
        for _ in range(4):
            outputs = call(*(_double(value, g) for value in arguments))
            distances = map(_distance, outputs, oracle)
            most = [max(pair) for pair in zip(most, distances, strict=True)]
    return most


def _eps(dtype: torch.dtype) -> float:
    """The unit of the arithmetic: kernels compute in float32 unless the tensors are float64."""
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _double(value: Tensor | None, moved_by: torch.Generator | None = None) -> Tensor | None:
    """The value in float64, each number moved by a unit up or down if there is a generator."""
    if value is None or not value.is_floating_point():
        return value
    double = value.detach().double().contiguous()
    if moved_by is not None:
        sign = torch.randint(2, double.shape, generator=moved_by).mul_(2).sub_(1).to(double.device)
        double = double * (1 + _eps(value.dtype) * sign.double())
    return double.requires_grad_(value.requires_grad)


def _distance(a: Tensor, b: Tensor) -> float:
    assert bool(torch.isfinite(a).all())
    return _largest(a.double() - b.double())


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
