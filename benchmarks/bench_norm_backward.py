"""norm_backward against PyTorch's gradients of F.silu and F.group_norm, channels-last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comparison import Comparison, every_dtype, every_shape
from torch import Tensor

from fastdiff import ops

GROUPS = 32


def copies(size: int) -> Callable[[Comparison], dict[str, str]]:
    """Notes: GB/s of the least possible traffic, 3 S, and its share of the GB/s of a copy."""

    def notes(comparison: Comparison) -> dict[str, str]:
        copy = comparison.peers.pop("copy")
        rate, of_copy = 3 * size / comparison.ours, 2 * size / copy
        return {"GB/s": f"{rate / 1e9:.1f}", "of a copy's": f"{rate / of_copy:.0%}"}

    return notes


@every_dtype
@every_shape((16, 128, 32, 32), (16, 256, 16, 16), (64, 64, 16, 16))
def bench_norm_backward(versus, shape, dtype) -> None:
    """In place, as the gradient of a convolution's input is a temporary."""
    n, channels, h, w = shape
    x, grad = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(2, channels).to(dtype)
    statistics = [ops.channel_statistics(x)]
    normed, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, h * w, GROUPS, 1e-5)
    memory = grad.clone()

    def ours() -> Tensor:
        return ops.norm_backward(memory, x, statistics, GROUPS, weight, bias, in_place=True).x

    def theirs() -> Tensor:
        du = torch.ops.aten.silu_backward(grad, normed)
        dx: Tensor = torch.ops.aten.native_group_norm_backward(
            du, x, mean, rstd, weight, n, channels, h * w, GROUPS, [True] * 3
        )[0]
        return dx

    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    wanted = theirs()
    assert (ours() - wanted).abs().max() <= tolerance * wanted.abs().max()
    versus(
        ours,
        {"torch": theirs, "copy": lambda: torch.empty_like(x).copy_(x)},
        notes=copies(x.numel() * x.element_size()),
    )
