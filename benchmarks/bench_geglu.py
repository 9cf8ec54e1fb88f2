"""geglu and its gradient against the halves of its input, one times the GELU of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import every_dtype, every_shape
from torch import Tensor

from fastdiff import ops


def peer(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


# Stable Diffusion's levels
shapes = every_shape((2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240))


@every_dtype
@shapes
def bench_geglu(versus, shape, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        torch.testing.assert_close(ops.geglu(x), peer(x), atol=tolerance, rtol=tolerance)
        versus(lambda: ops.geglu(x), {"torch": lambda: peer(x)})


@every_dtype
@shapes
def bench_backward(versus, shape, dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    ours, theirs = ops.geglu(x), peer(x)
    grad = torch.randn(ours.shape).to(dtype)

    def run(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, x, grad, retain_graph=True)

    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(run(ours)[0], run(theirs)[0], atol=tolerance, rtol=tolerance)
    versus(lambda: run(ours), {"torch": lambda: run(theirs)})
