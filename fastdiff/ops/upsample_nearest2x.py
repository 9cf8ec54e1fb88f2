"""Nearest-neighbour upsampling by a factor of 2, with which a U-Net's way up starts a level."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.common.checks import check_floating
from fastdiff.ops import reference
from fastdiff.ops.dispatch import differentiable, dispatch
from fastdiff.ops.gpu import on_gpu

torch.library.define("fastdiff::upsample_nearest2x", "(Tensor x) -> Tensor")
torch.library.define("fastdiff::upsample_nearest2x_backward", "(Tensor grad) -> Tensor")

_kernel = differentiable(torch.ops.fastdiff.upsample_nearest2x.default)
_backward_op = torch.ops.fastdiff.upsample_nearest2x_backward.default


def upsample_nearest2x(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by a factor of 2: each pixel becomes a square of four.

    Args:
        x: [N, C, H, W], floating point, channels-first or channels-last.

    Returns:
        [N, C, 2 H, 2 W] in x's dtype and memory format. Differentiable.

    Raises:
        TypeError: x is not floating point.
        ValueError: x does not have four dimensions.
    """
    return dispatch(x, _kernel, reference.upsample_nearest2x, _check, x)


def _check(x: Tensor) -> None:
    check_floating(x, "x")
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")


def _check_backward(grad: Tensor) -> None:
    _check(grad)
    if grad.shape[2] % 2 or grad.shape[3] % 2:
        raise ValueError(f"grad must be [N, C, 2 H, 2 W], got {tuple(grad.shape)}")


on_gpu("upsample_nearest2x", _check)
on_gpu("upsample_nearest2x_backward", _check_backward, family="upsample_nearest2x")


@torch.library.impl("fastdiff::upsample_nearest2x", "CPU")
def _on_cpu(x: Tensor) -> Tensor:
    _check(x)
    return reference.upsample_nearest2x(x)


@torch.library.impl("fastdiff::upsample_nearest2x_backward", "CPU")
def _backward_on_cpu(grad: Tensor) -> Tensor:
    _check_backward(grad)
    return reference.upsample_nearest2x_backward(grad)


@torch.library.register_fake("fastdiff::upsample_nearest2x")
def _fake(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, c, 2 * h, 2 * w)).to(memory_format=suggest_memory_format(x))


@torch.library.register_fake("fastdiff::upsample_nearest2x_backward")
def _fake_backward(grad: Tensor) -> Tensor:
    n, c, h, w = grad.shape
    return grad.new_empty((n, c, h // 2, w // 2)).to(memory_format=suggest_memory_format(grad))


def _backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return _backward_op(grad)


torch.library.register_autograd("fastdiff::upsample_nearest2x", _backward)
