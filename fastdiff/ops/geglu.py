"""The gated linear unit of a transformer block's feed-forward layer.

It is for inference on a CPU, and is used by ``fastdiff.compiler``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_no_gradient
from fastdiff.ops import reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.profiling import span

torch.library.define("fastdiff::geglu", "(Tensor x) -> Tensor")


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) with x = [a, b], GEGLU of Shazeer 2020 (arXiv:2002.05202), with the exact GELU,
    b (1 + erf(b / sqrt(2))) / 2.

    Args:
        x: [..., 2D], float32 or bfloat16 (other dtypes are computed by the reference).

    Returns:
        [..., D], contiguous; computed in float32 at least and rounded once.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: x is not floating point or not dense.
        ValueError: x has no dimension, or the last one is odd.
    """
    check_no_gradient(x)
    check_floating(x, "x")
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2D], got {tuple(x.shape)}")
    with span("geglu"):
        return (torch.ops.fastdiff if kernel_runs(x) else reference).geglu(x)


@torch.library.register_fake("fastdiff::geglu")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
