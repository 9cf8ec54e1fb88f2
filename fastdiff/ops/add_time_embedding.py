"""Add the time embedding to a U-Net's activations: x + emb[:, :, None, None]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_same_kind
from fastdiff.ops import reference
from fastdiff.ops.dispatch import differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu

torch.library.define("fastdiff::add_time_embedding", "(Tensor x, Tensor emb) -> Tensor")

_kernel = differentiable(torch.ops.fastdiff.add_time_embedding.default)


def add_time_embedding(x: Tensor, emb: Tensor) -> Tensor:
    """Add a per-channel embedding to every pixel.

    Args:
        x: activations [N, C, *spatial], floating point, any memory format.
        emb: projected time embedding [N, C], of x's dtype and device.

    Returns:
        x + emb broadcast over the spatial dimensions, in x's memory format.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    return dispatch(x, _kernel, reference.add_time_embedding, _check, x, emb)


def _check(x: Tensor, emb: Tensor) -> None:
    check_floating(x, "x")
    if x.ndim < 2 or emb.shape != x.shape[:2]:
        raise ValueError(
            f"x must be [N, C, ...] and emb [N, C], got {tuple(x.shape)} and {tuple(emb.shape)}"
        )
    check_same_kind(emb, x, "emb", "x")


on_gpu("add_time_embedding", _check)


@torch.library.register_fake("fastdiff::add_time_embedding")
def _fake(x: Tensor, emb: Tensor) -> Tensor:
    return fake_like(x, emb)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
    demb = None
    if ctx.needs_input_grad[1]:
        demb = grad.sum(dim=tuple(range(2, grad.ndim))) if grad.ndim > 2 else grad
    return grad, demb


torch.library.register_autograd("fastdiff::add_time_embedding", _backward)
