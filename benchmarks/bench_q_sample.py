"""q_sample against the plain PyTorch expression."""

from __future__ import annotations

import torch
from comparison import every_dtype, every_shape

from fastdiff import ops, schedules
from fastdiff.ops import reference


@every_dtype
@every_shape((16, 3, 32, 32), (8, 4, 64, 64), (64, 3, 64, 64))
def bench_q_sample(versus, shape, dtype) -> None:
    x0, noise = torch.randn(2, *shape).to(dtype)
    t = torch.randint(1000, shape[:1])
    signal, sigma = schedules.cosine().coefficients(x0.device, torch.float32)
    arguments = (x0, t, noise, signal, sigma)
    torch.testing.assert_close(ops.q_sample(*arguments), reference.q_sample(*arguments))
    versus(lambda: ops.q_sample(*arguments), {"torch": lambda: reference.q_sample(*arguments)})
