"""add_time_embedding against x + emb[:, :, None, None]."""

from __future__ import annotations

import torch
from comparison import every_dtype, every_layout, every_shape

from fastdiff import ops


@every_layout
@every_dtype
@every_shape((8, 128, 32, 32), (4, 320, 64, 64))
def bench_add_time_embedding(versus, shape, dtype, layout) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    emb = torch.randn(shape[:2]).to(dtype)
    assert torch.equal(ops.add_time_embedding(x, emb), x + emb[:, :, None, None])
    versus(lambda: ops.add_time_embedding(x, emb), {"torch": lambda: x + emb[:, :, None, None]})
