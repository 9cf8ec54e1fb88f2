"""The additions after a convolution, and the statistics of the result for the next norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_like, check_same_kind
from fastdiff.ops import reference
from fastdiff.ops.dispatch import differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu

SPANS = (256, 128, 64, 32)  # lengths of a span, in pixels, of which a GPU block takes statistics
BLOCKS = 264  # number of blocks that keeps a GPU busy: two for each multiprocessor of an H100

torch.library.define(
    "fastdiff::conv_epilogue",
    "(Tensor x, Tensor? bias, Tensor? emb, Tensor? residual, int spans) -> (Tensor, Tensor)",
)

_kernel = differentiable(torch.ops.fastdiff.conv_epilogue.default)


def conv_epilogue(
    x: Tensor,
    bias: Tensor | None = None,
    emb: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = x + bias + emb + residual, with the statistics of y for the next ``group_norm_silu``.

    Args:
        x: result of a convolution without a bias, [N, C, *spatial], floating point, channels-first
            or channels-last.
        bias: the convolution's bias [C].
        emb: projected time embedding [N, C].
        residual: like x.
        statistics: also compute the statistics of y.

    Returns:
        y like x, summed in float32 or better and rounded once; and its statistics for
        ``group_norm_silu`` or None. Statistics are float32 [N, S, 4, C]: for each of S spans of an
        image's pixels and each channel the number of values, their mean, the rounding error of that
        float32 mean, and the sum of squared deviations from the mean. y is differentiable in every
        argument; the statistics are not.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    spans = _spans(x) if statistics and x.ndim > 1 else 0
    args = (x, bias, emb, residual, spans)
    y, of_y = dispatch(x, _kernel, reference.conv_epilogue, _check, *args)
    return y, of_y if statistics else None


def _spans(x: Tensor) -> int:
    """Number of spans of an image: of the longest length that gives at least BLOCKS blocks.

    A block takes one span of 128 bytes of channels. The number depends on the shape alone, so that
    results are the same on any device.
    """
    pixels, across = math.prod(x.shape[2:]), math.ceil(x.shape[1] * x.element_size() / 128)
    for length in SPANS:
        spans = max(1, math.ceil(pixels / length))
        if x.shape[0] * spans * across >= BLOCKS:
            break
    return spans


def _check(
    x: Tensor, bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, spans: int
) -> None:
    check_floating(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got {tuple(x.shape)}")
    for name, value, shape in (("bias", bias, x.shape[1:2]), ("emb", emb, x.shape[:2])):
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
            check_same_kind(value, x, name, "x")
    if residual is not None:
        check_like(residual, x, "residual", "x")
    if spans < 0:
        raise ValueError(f"spans must not be negative, got {spans}")


on_gpu("conv_epilogue", _check)


@torch.library.impl("fastdiff::conv_epilogue", "CPU")
def _on_cpu(
    x: Tensor, bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, spans: int
) -> tuple[Tensor, Tensor]:
    _check(x, bias, emb, residual, spans)
    y, statistics = reference.conv_epilogue(x, bias, emb, residual, spans)
    return y.clone() if y is x else y, statistics  # an operation must not return its input


@torch.library.register_fake("fastdiff::conv_epilogue")
def _fake(
    x: Tensor, bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, spans: int
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], spans, 4, x.shape[1]) if spans else (0,)
    y = fake_like(x, bias, emb, residual)
    return y, x.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _statistics_grad):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 5
    needs, demb, dbias = ctx.needs_input_grad, None, None
    if needs[1] or needs[2]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        summed = grad.flatten(2).sum(2, dtype=wide) if grad.ndim > 2 else grad.to(wide)
        demb = summed.to(grad.dtype) if needs[2] else None
        dbias = summed.sum(0).to(grad.dtype) if needs[1] else None
    return grad, dbias, demb, grad if needs[3] else None, None


torch.library.register_autograd("fastdiff::conv_epilogue", _backward, setup_context=_setup_context)
