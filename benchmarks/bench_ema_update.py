"""ema_update against PyTorch's lerp of a list of tensors."""

from __future__ import annotations

import torch

from fastdiff import ops

SHAPES = [(256, 256, 3, 3)] * 30 + [(256,)] * 100


def bench_ema_update(versus) -> None:
    averages, others, parameters = ([torch.randn(s) for s in SHAPES] for _ in range(3))
    for other, average in zip(others, averages, strict=True):
        other.copy_(average)

    def ours() -> None:
        ops.ema_update(averages, parameters, 1e-3)

    def theirs() -> None:
        torch._foreach_lerp_(others, parameters, 1e-3)

    ours()
    theirs()
    for a, b in zip(averages, others, strict=True):
        torch.testing.assert_close(a, b)
    versus(ours, {"torch": theirs})
