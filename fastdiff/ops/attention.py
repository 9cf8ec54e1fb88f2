"""Softmax attention that never stores the attention matrix, and its gradients.

It is for CPUs, and is used by ``fastdiff.compiler``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_same_kind
from fastdiff.ops import reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.dispatch import check_devices, differentiable, recorded, refuse_to_differentiate
from fastdiff.ops.profiling import span

torch.library.define("fastdiff::attention", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
# The result, and for the backward float32 [2, B, H, L]: the largest score of each query, times
# log2(e), and the sum of 2^(score - largest), which is exacter than the logarithm of the sum.
torch.library.define(
    "fastdiff::attention_forward", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)"
)
# The gradients of q, k and v, each [B, H, L, D] in memory as [B, L, H, D].
torch.library.define(
    "fastdiff::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)

_backward_op = differentiable(torch.ops.fastdiff.attention_backward.default)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v for each image and head, after Dao et al. 2022 (arXiv:2205.14135).

    Differentiable once in q, k and v: the gradients recompute the scores (Dao 2023,
    arXiv:2307.08691, algorithm 2), of which two numbers a query are kept.

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
        NotImplementedError: a gradient of a kernel's result is itself differentiated.
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
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
        if not kernel_runs(q):
            return reference.attention(q, k, v, scale)
        if recorded(q, k, v):
            return torch.ops.fastdiff.attention_forward(q, k, v, scale)[0]
        return torch.ops.fastdiff.attention(q, k, v, scale)


def _rows_first(x: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [B, H, rows, columns], in memory as [B, rows, H, columns]."""
    return x.new_empty((x.shape[0], rows, x.shape[1], columns)).transpose(1, 2)


@torch.library.register_fake("fastdiff::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check_devices(q, k, v)
    return _rows_first(q, q.shape[2], v.shape[3])


@torch.library.register_fake("fastdiff::attention_forward")
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _fake(q, k, v, scale), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


@torch.library.register_fake("fastdiff::attention_backward")
def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(q, k, v, dout, out, statistics)
    dq, dk, dv = (_rows_first(x, *x.shape[2:]) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, statistics)


def _backward(ctx, dout, _dstatistics):  # type: ignore[no-untyped-def]
    if dout is None:
        return None, None, None, None
    gradients = _backward_op(dout, *ctx.saved_tensors, ctx.scale)
    needed = zip(ctx.needs_input_grad, gradients, strict=False)
    return *(gradient if need else None for need, gradient in needed), None


torch.library.register_autograd(
    "fastdiff::attention_forward", _backward, setup_context=_setup_context
)
refuse_to_differentiate("attention_backward")
