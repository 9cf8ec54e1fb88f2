"""The gated linear unit of a transformer block's feed-forward layer, and its gradient.

It is for CPUs, and is used by ``fastdiff.compiler``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating
from fastdiff.ops import reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.dispatch import check_devices, differentiable, refuse_to_differentiate
from fastdiff.ops.profiling import span

torch.library.define("fastdiff::geglu", "(Tensor x) -> Tensor")
# The gradient of x = [a, b], contiguous: [grad gelu(b), grad a gelu'(b)].
torch.library.define("fastdiff::geglu_backward", "(Tensor grad, Tensor x) -> Tensor")

_op = differentiable(torch.ops.fastdiff.geglu.default)
_backward_op = differentiable(torch.ops.fastdiff.geglu_backward.default)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) with x = [a, b], GEGLU of Shazeer 2020 (arXiv:2002.05202), with the exact GELU,
    b (1 + erf(b / sqrt(2))) / 2. Differentiable once.

    Args:
        x: [..., 2D], float32 or bfloat16 (other dtypes are computed by the reference).

    Returns:
        [..., D], contiguous; computed in float32 at least and rounded once.

    Raises:
        NotImplementedError: a gradient of a kernel's result is itself differentiated.
        TypeError: x is not floating point or not dense.
        ValueError: x has no dimension, or the last one is odd.
    """
    check_floating(x, "x")
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2D], got {tuple(x.shape)}")
    with span("geglu"):
        return _op(x) if kernel_runs(x) else reference.geglu(x)


@torch.library.register_fake("fastdiff::geglu")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("fastdiff::geglu_backward")
def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    check_devices(x, grad)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return _backward_op(grad, *ctx.saved_tensors)


torch.library.register_autograd("fastdiff::geglu", _backward, setup_context=_setup_context)
refuse_to_differentiate("geglu_backward")
