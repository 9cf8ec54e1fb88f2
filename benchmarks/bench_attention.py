"""attention and its gradients against F.scaled_dot_product_attention and its."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import every_dtype, every_shape
from torch import Tensor

from fastdiff import ops

# images, heads, pixels, width
shapes = every_shape((8, 4, 256, 64), (2, 8, 1024, 40), (1, 1, 256, 256), (64, 2, 64, 32))


def make(shape: tuple[int, ...], dtype: torch.dtype, tensors: int) -> list[Tensor]:
    """As a U-Net's projections lie in memory: heads beside each other in each pixel."""
    b, h, pixels, width = shape
    return [torch.randn(b, pixels, h, width).to(dtype).transpose(1, 2) for _ in range(tensors)]


@every_dtype
@shapes
def bench_attention(versus, shape, dtype) -> None:
    q, k, v = make(shape, dtype, 3)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        theirs = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(ops.attention(q, k, v), theirs, atol=tolerance, rtol=tolerance)
        versus(
            lambda: ops.attention(q, k, v),
            {"torch": lambda: F.scaled_dot_product_attention(q, k, v)},
        )


@every_dtype
@shapes
def bench_backward(versus, shape, dtype) -> None:
    q, k, v, dout = make(shape, dtype, 4)
    leaves = [value.requires_grad_() for value in (q, k, v)]
    ours, theirs = ops.attention(*leaves), F.scaled_dot_product_attention(*leaves)

    def run(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dout, retain_graph=True)

    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for mine, wanted in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)
    versus(lambda: run(ours), {"torch": lambda: run(theirs)})
