"""Softmax attention that never stores the attention matrix.

It is for inference on a CPU, and is used by ``fastdiff.compiler``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_no_gradient, check_same_kind
from fastdiff.ops import reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

torch.library.define("fastdiff::attention", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v for each image and head, after Dao et al. 2022 (arXiv:2205.14135).

    Args:
        q: [B, H, L, D], float32 or bfloat16 (other dtypes are computed by the reference).
        k: [B, H, S, D], S at least 1.
        v: [B, H, S, D'].
        scale: factor of the scores q k^T; None for 1 / sqrt(D).

    Returns:
        [B, H, L, D'], in memory as [B, L, H, D']; sums are taken in float32 or better. In bfloat16,
        on a processor that multiplies it, the exponentials are rounded to bfloat16 before their
        product with v, as PyTorch's own kernel does; their sum is not.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    check_no_gradient(q, k, v)
    check_floating(q, "q")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "q, k and v must be [B, H, L, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    b, h, _, d = q.shape
    for name, value, shape in (
        ("k", k, (b, h, k.shape[2], d)),
        ("v", v, (b, h, k.shape[2], v.shape[3])),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        check_same_kind(value, q, name, "q")
    if k.shape[2] < 1:
        raise ValueError(f"there must be at least one key, got k of shape {tuple(k.shape)}")
    if scale is None:
        scale = d**-0.5 if d else 1.0
    with span("attention"):
        return (torch.ops.fastdiff if kernel_runs(q) else reference).attention(q, k, v, scale)


@torch.library.register_fake("fastdiff::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check_devices(q, k, v)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
