"""The functions that the nodes of a fused graph call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.compiler.choose import algorithms
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.compiler.run.forms import Forms, channels_last
from fastdiff.compiler.run.packing import PackedWeight
from fastdiff.ops import reference
from fastdiff.ops.attention import attention
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.conv2d_algorithms import ALGORITHMS
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.group_norm_coefficients import channel_statistics
from fastdiff.ops.group_norm_coefficients import kernel_runs as has_kernel
from fastdiff.ops.group_norm_silu import group_norm_silu

# With more rows than this PyTorch's linear, which repacks its weight at every call, is as fast.
MOST_PRODUCT_ROWS = 64
_conv2d = torch.ops.fastdiff.conv2d.default
_attention = torch.ops.fastdiff.attention.default
_coefficients = torch.ops.fastdiff.group_norm_coefficients.default


class Planned:
    """A call with a packed weight and one algorithm for each size of its input.

    Args:
        index: of its weight in the list that ``packing.Watch`` returns.

    Attributes:
        plans: for each size of the input so far, the name of the algorithm.
        last_weight: the weight of the last size that was planned, for the report.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.plans: dict[tuple[Any, ...], str] = {}
        self.last_weight: weakref.ref[PackedWeight] | None = None

    def algorithm(self, x: Tensor, weight: PackedWeight) -> str:
        """The algorithm for inputs of the size of x; ``plain`` is PyTorch's own operation."""
        key = (x.shape, x.dtype, torch.get_num_threads(), kernel_runs(x))
        name = self.plans.get(key)
        if name is None:
            name = self.plans[key] = self._choose(x, weight) if key[-1] else "plain"
            self.last_weight = weakref.ref(weight)
        return name

    def _choose(self, x: Tensor, weight: PackedWeight) -> str:
        raise NotImplementedError


class Convolution(Planned):
    """A convolution or a linear layer with prologue and epilogue, for any size of its input.

    Args:
        index: of its weight in the list that ``packing.Watch`` returns.
        spec: what it computes.
        x_form: number of dimensions and channel dimension of its input.
        y_form: number of dimensions and channel dimension of its result and its residual.
        allowed: the algorithms that it may use, from ``timings.ALGORITHM_NAMES``.
        measured: whether the algorithm is chosen by measured times.
        seconds_per_byte: how many seconds a byte of packed weight must save.
    """

    __name__ = "conv2d"
    __qualname__ = "conv2d"

    def __init__(
        self,
        index: int,
        spec: ConvSpec,
        x_form: tuple[int, int],
        y_form: tuple[int, int],
        *,
        allowed: Sequence[str],
        measured: bool,
        seconds_per_byte: float,
    ) -> None:
        super().__init__(index)
        self.forms = Forms(x_form, y_form)
        self.spec, self.numbers = spec, spec.encode()  # encoded once, not at every call
        self.without_statistics = replace(spec, statistics=False)
        self.allowed, self.measured = allowed, measured
        self.seconds_per_byte = seconds_per_byte

    def __call__(
        self,
        weights: Sequence[PackedWeight],
        x: Tensor,
        *,
        skip: Tensor | None = None,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
        scale: float = 1.0,
    ) -> Any:
        """The result, or a pair of it and its statistics."""
        weight = weights[self.index]
        x, residual, shape = self.forms.enter(x, residual)
        if emb is not None and emb.shape[0] != x.shape[0]:
            emb = emb.expand(x.shape[0], -1)
        if norm is not None and norm.shape[0] != x.shape[0]:
            norm = norm.expand(x.shape[0], -1, -1)
        algorithm = self.algorithm(x, weight)
        if algorithm != "plain":
            y, statistics = _conv2d(
                x, weight.packed(algorithm), self.numbers, ALGORITHMS[algorithm].number, skip,
                bias, norm, emb, residual, scale,
            )  # fmt: skip
        else:
            # Timings are of channels-last inputs, for which PyTorch's result is channels-last too.
            x = x.contiguous(memory_format=torch.channels_last)
            y, _ = reference.conv2d(
                x, weight.plain(x.dtype), self.without_statistics, skip=skip, bias=bias, norm=norm,
                emb=emb, residual=residual, scale=scale,
            )  # fmt: skip
            statistics = channel_statistics(y) if self.spec.statistics else None
        y = self.forms.leave(y, shape)
        return (y, statistics) if self.spec.statistics else y

    def _choose(self, x: Tensor, weight: PackedWeight) -> str:
        n, _, height, width = x.shape
        size = (n, self.spec.channels, height, width)
        sizes = Sizes(size, self.spec, x.dtype, torch.get_num_threads())
        return algorithms.choose(
            sizes,
            _packable(weight, self.allowed),
            self.measured and x.numel() > 0,
            self.seconds_per_byte,
            # Without the clock a choice depends on the sizes alone, not on what came before.
            held=weight.by_algorithm if self.measured else (),
        )


class Product(Planned):
    """Several linear layers of the same rows as one product.

    Args:
        index: of its weight in the list that ``packing.Watch`` returns.
        spec: the product as a 1x1 convolution.
    """

    __name__ = "product"
    __qualname__ = "product"

    def __init__(self, index: int, spec: ConvSpec) -> None:
        super().__init__(index)
        self.spec, self.numbers = spec, spec.encode()

    def __call__(self, weights: Sequence[PackedWeight], x: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, C] to [N, K]."""
        packed = weights[self.index]
        algorithm = self.algorithm(x, packed)
        if algorithm == "plain":
            weight = packed.plain(x.dtype)
            return F.linear(F.silu(x) if self.spec.silu else x, weight.view(weight.shape[:2]), bias)
        rows, number = x.unsqueeze(2).unsqueeze(3), ALGORITHMS[algorithm].number
        y, _ = _conv2d(rows, packed.packed(algorithm), self.numbers, number, None, bias)
        return y.flatten(1)

    def _choose(self, x: Tensor, weight: PackedWeight) -> str:
        few = x.shape[0] <= MOST_PRODUCT_ROWS or weight.is_dropped
        return algorithms.product(self.spec, x.dtype) if few else "plain"


def _packable(weight: PackedWeight, allowed: Sequence[str]) -> Sequence[str]:
    """The algorithms among ``allowed`` that can still get their form of the weight."""
    return [n for n in allowed if n in weight.by_algorithm] if weight.is_dropped else allowed


class Attention:
    """Softmax attention without a mask: ``fastdiff.ops.attention`` where its kernel runs.

    Args:
        scale: factor of the scores; None for 1 / sqrt(D).
    """

    __name__ = "attention"
    __qualname__ = "attention"

    def __init__(self, scale: float | None) -> None:
        self.scale = scale
        self.last_weight: weakref.ref[PackedWeight] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, L, D], [B, H, S, D] and [B, H, S, D'] to [B, H, L, D']."""
        if kernel_runs(q):
            scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
            return _attention(q, k, v, scale)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class TrainedAttention(Attention):
    """The same with gradients."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, L, D], [B, H, S, D] and [B, H, S, D'] to [B, H, L, D']."""
        if kernel_runs(q):
            return attention(q, k, v, self.scale)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


def coefficients(
    statistics: list[Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """``ops.group_norm_coefficients``; scale and shift may be [1, C], for all images, or [N, C]."""
    n = statistics[0].shape[0]
    if scale is not None and scale.shape[0] != n:
        scale = scale.expand(n, -1)
    if shift is not None and shift.shape[0] != n:
        shift = shift.expand(n, -1)
    args = (statistics, num_groups, weight, bias, eps, scale, shift)
    if has_kernel(statistics[0]):
        return _coefficients(*args)
    return reference.group_norm_coefficients(*args)


def gains(rows: Tensor) -> Tensor:
    """Gains [N or 1, C] of channels as the coefficients [N or 1, 2, C] of a norm without offset."""
    return F.pad(rows.float().unsqueeze(1), (0, 0, 0, 1))


def constant_gains(channels: Sequence[int], factors: Sequence[float]) -> Tensor:
    """The same, [1, 2, C], of constants for groups of channels.

    A tensor that is made of numbers is a constant of a recording.
    """
    row = [factor for count, factor in zip(channels, factors, strict=True) for _ in range(count)]
    return torch.tensor([[row, [0.0] * len(row)]], dtype=torch.float32, device="cpu")


def statistics_of(x: Tensor, channel: int) -> Tensor:
    """``channel_statistics`` of x, whose channels are dimension ``channel``, without gradient."""
    with torch.no_grad():
        return channel_statistics(x if channel == 1 else x.movedim(channel, 1))


def normalised_rows(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """group_norm(x) of images [N, C, *pixels] as rows [N, L, C]."""
    rows = x.flatten(2).transpose(1, 2).contiguous()
    n, length, channels = rows.shape
    images = channels_last(rows, (n, channels, length, 1))
    y = group_norm_silu(images, num_groups, weight, bias, eps, silu=False)
    return y.flatten(2).transpose(1, 2)


def join(*parts: Tensor) -> Tensor:
    """The parts, concatenated."""
    return torch.cat(parts)


def split(y: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Split the last dimension into views of the given sizes."""
    return torch.split_with_sizes(y, sizes, -1)


class UnderAutocast:
    """Calls an operation of PyTorch as ``torch.autocast("cpu", dtype)`` does.

    Args:
        operation: the function.
        dtype: bfloat16 or float16.
    """

    __name__ = "under_autocast"
    __qualname__ = "under_autocast"

    def __init__(self, operation: Callable[..., Any], dtype: torch.dtype) -> None:
        self.stands_for, self.dtype = operation, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The operation's result. Nothing is cached: a cached tensor could not be recorded."""
        with torch.autocast("cpu", dtype=self.dtype, cache_enabled=False):
            return self.stands_for(*args, **kwargs)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called under autocast, and switches it off while it runs."""

    def run(*args: Any) -> Any:
        # Not by torch.autocast(enabled=False), which would take longer than all else in Python.
        torch.set_autocast_enabled("cpu", False)
        try:
            return function(*args)
        finally:
            torch.set_autocast_enabled("cpu", True)

    return run


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    return function


def restore(strides: tuple[int, ...] | None, order: list[int]) -> Callable[[Tensor], Tensor]:
    """A function that returns a tensor with the strides that it has in eager mode.

    Args:
        strides: these strides where they are known; else None.
        order: the dimensions from the outermost to the innermost in memory, from which dense
            strides are computed where ``strides`` is None.
    """
    return _named("restore", partial(_restore, strides, order))


def _restore(strides: tuple[int, ...] | None, order: list[int], x: Tensor) -> Tensor:
    dense, step = [0] * x.ndim, 1
    for d in reversed(order):
        dense[d] = step
        step *= max(x.shape[d], 1)
    if strides is None:
        strides = tuple(dense)
    if x.stride() == strides:
        return x
    if order == sorted(order) and strides == tuple(dense) and not x.is_contiguous():
        return x.contiguous()  # unlike copy_, it writes in place to no tensor: it can be recorded
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
