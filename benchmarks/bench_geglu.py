"""geglu against the halves of its input, one times the GELU of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import every_dtype, every_shape
from torch import Tensor

from fastdiff import ops


def peer(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


@every_dtype
@every_shape((2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240))  # Stable Diffusion's levels
def bench_geglu(versus, shape, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        torch.testing.assert_close(ops.geglu(x), peer(x), atol=tolerance, rtol=tolerance)
        versus(lambda: ops.geglu(x), {"torch": lambda: peer(x)})
