"""add_time_embedding against x + emb[:, :, None, None]."""

from __future__ import annotations

import pytest
import torch

from fastdiff import ops

SHAPES = [(8, 128, 32, 32), (4, 320, 64, 64)]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def bench_add_time_embedding(versus, shape, dtype, layout) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    emb = torch.randn(shape[:2]).to(dtype)
    assert torch.equal(ops.add_time_embedding(x, emb), x + emb[:, :, None, None])
    versus(lambda: ops.add_time_embedding(x, emb), {"torch": lambda: x + emb[:, :, None, None]})
