"""philox_normal against torch.randn, which draws other numbers of the same law."""

from __future__ import annotations

import torch
from comparison import every_dtype, every_shape

from fastdiff import ops


@every_dtype
@every_shape((16, 3, 32, 32), (8, 4, 64, 64), (64, 3, 64, 64))
def bench_philox_normal(versus, shape, dtype) -> None:
    seed = torch.stack((torch.full(shape[:1], 7), torch.arange(shape[0])), dim=1)
    z = ops.philox_normal(seed, 0, shape, dtype).double()
    error = 5 * z.numel() ** -0.5  # five standard deviations of the mean; of the variance more
    assert abs(z.mean()) < error
    assert abs(z.var() - 1) < 2 * error
    versus(
        lambda: ops.philox_normal(seed, 0, shape, dtype),
        {"torch": lambda: torch.randn(shape, dtype=dtype)},
    )
