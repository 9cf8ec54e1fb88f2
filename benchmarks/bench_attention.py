"""attention against F.scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import every_dtype, every_shape

from fastdiff import ops


@every_dtype
@every_shape((8, 4, 256, 64), (2, 8, 1024, 40), (1, 1, 256, 256))  # images, heads, pixels, width
def bench_attention(versus, shape, dtype) -> None:
    b, h, pixels, width = shape
    # As a U-Net's projections lie in memory: heads beside each other in each pixel.
    q, k, v = (torch.randn(b, pixels, h, width).to(dtype).transpose(1, 2) for _ in range(3))
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        theirs = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(ops.attention(q, k, v), theirs, atol=tolerance, rtol=tolerance)
        versus(
            lambda: ops.attention(q, k, v),
            {"torch": lambda: F.scaled_dot_product_attention(q, k, v)},
        )
