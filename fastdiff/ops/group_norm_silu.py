"""GroupNorm and SiLU, with the additions around them in a U-Net's residual block, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.common.checks import (
    check_device,
    check_floating,
    check_same_kind,
    check_statistics,
)
from fastdiff.ops import reference
from fastdiff.ops.dispatch import check_devices, differentiable, dispatch, fake_like
from fastdiff.ops.gpu import on_gpu

torch.library.define(
    "fastdiff::group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, "
    "Tensor? scale, Tensor? shift, Tensor? residual, bool silu, Tensor? skip, "
    "Tensor? statistics) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastdiff::group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? add, Tensor? scale, Tensor? shift, bool silu, Tensor? skip) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_op = differentiable(torch.ops.fastdiff.group_norm_silu.default)
_backward_op = torch.ops.fastdiff.group_norm_silu_backward.default


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
    skip: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = silu(GroupNorm(x + add) * (1 + scale) + shift) + residual.

    GroupNorm is Wu & He 2018 (arXiv:1803.08494), SiLU x * sigmoid(x); ``add`` is where a residual
    block adds its time embedding (DDPM), ``scale`` and ``shift`` are ADM's adaptive group
    normalisation (arXiv:2105.05233, eq. 3). Differentiable in every tensor.

    Args:
        x: activations [N, C, *spatial], floating point, channels-first or channels-last.
        num_groups: groups that share statistics; must divide C.
        weight: per-channel gain [C], or None for 1.
        bias: per-channel offset [C], or None for 0.
        eps: added to the variance.
        add: [N, C], added to every pixel before the statistics are taken.
        scale: [N, C], the normalised value is multiplied by 1 + scale.
        shift: [N, C], added after the scale.
        residual: like y, added to the result.
        silu: apply SiLU; False for the norm before attention.
        skip: [N, C', *spatial]; the operation then normalises the concatenation of x and skip along
            the channels, of C + C' channels. A GPU kernel never writes it to memory, nor does a CPU
            kernel channels-last.
        statistics: the statistics of x (without ``add``) from ``conv_epilogue``, float32
            [N, S, 4, C]. They save a GPU kernel a pass over x; a CPU kernel ignores them.

    Returns:
        y in the shape of x (of the concatenation), with x's dtype and memory format. Statistics are
        taken in float32 or better.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit, or num_groups does not divide C.
    """
    return dispatch(
        x, _kernel, reference.group_norm_silu, _check,
        x, num_groups, weight, bias, eps, add, scale, shift, residual, silu, skip, statistics,
    )  # fmt: skip


def _kernel(*args: Any) -> Tensor:
    return _op(*args)[0]


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    skip: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    check_floating(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got {tuple(x.shape)}")
    if statistics is not None:
        if skip is not None:
            raise ValueError("statistics and skip cannot both be given")
        check_statistics(statistics, x)
    n, channels, *spatial = x.shape
    if skip is not None:
        if skip.ndim != x.ndim or skip.shape != (n, skip.shape[1], *spatial):
            raise ValueError(
                f"skip must have the shape of x but for its channels, {tuple(x.shape)}, "
                f"got {tuple(skip.shape)}"
            )
        check_same_kind(skip, x, "skip", "x")
        channels += skip.shape[1]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups must divide the channels: got {num_groups} groups for {channels} channels"
        )
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("add", add, (n, channels)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
        ("residual", residual, (n, channels, *spatial)),
    ):
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            check_same_kind(value, x, name, "x")


def _check_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int,
    weight: Tensor | None, bias: Tensor | None, add: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, silu: bool, skip: Tensor | None = None,
) -> None:  # fmt: skip
    _check(x, num_groups, weight, bias, 0.0, add, scale, shift, grad, silu, skip)
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value.shape != (x.shape[0], num_groups) or value.dtype != torch.float64:
            raise ValueError(
                f"{name} must be float64 [{x.shape[0]}, {num_groups}], "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        check_device(value, x, name, "x")


on_gpu("group_norm_silu", _check)
on_gpu("group_norm_silu_backward", _check_backward, family="group_norm_silu")


@torch.library.register_fake("fastdiff::group_norm_silu")
def _fake(  # type: ignore[no-untyped-def]
    x, num_groups, weight, bias, eps, add, scale, shift, residual, silu, skip, statistics
):
    check_devices(x, weight, bias, add, scale, shift, residual, skip, statistics)
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    shape = (x.shape[0], channels, *x.shape[2:])
    y = x.new_empty(shape).to(memory_format=suggest_memory_format(x))
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float64)
    return y, mean, torch.empty_like(mean)


@torch.library.register_fake("fastdiff::group_norm_silu_backward")
def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, mean, rstd, num_groups, weight, bias, add, scale, shift, silu, skip
):
    dx = fake_like(x, grad, mean, rstd, weight, bias, add, scale, shift, skip)
    dskip = x.new_empty(0)
    if skip is not None:
        dskip = skip.new_empty(skip.shape).to(memory_format=suggest_memory_format(x))
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    per_channel, per_image = x.new_empty(channels), x.new_empty((x.shape[0], channels))
    return (
        dx,
        dskip,
        per_channel,
        torch.empty_like(per_channel),
        per_image,
        torch.empty_like(per_image),
        torch.empty_like(per_image),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, num_groups, weight, bias, _, add, scale, shift, _, silu, skip, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, add, scale, shift, skip)
    ctx.num_groups, ctx.silu = num_groups, silu


def _backward(ctx, grad, _mean_grad, _rstd_grad):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 12
    x, mean, rstd, weight, bias, add, scale, shift, skip = ctx.saved_tensors
    dx, dskip, dweight, dbias, dadd, dscale, dshift = _backward_op(
        grad, x, mean, rstd, ctx.num_groups, weight, bias, add, scale, shift, ctx.silu, skip
    )
    needs = ctx.needs_input_grad

    def wanted(index: int, value: Tensor) -> Tensor | None:
        return value if needs[index] else None

    return (
        wanted(0, dx),
        None,
        wanted(2, dweight),
        wanted(3, dbias),
        None,
        wanted(5, dadd),
        wanted(6, dscale),
        wanted(7, dshift),
        wanted(8, grad),
        None,
        wanted(10, dskip),
        None,
    )


torch.library.register_autograd(
    "fastdiff::group_norm_silu", _backward, setup_context=_setup_context
)
