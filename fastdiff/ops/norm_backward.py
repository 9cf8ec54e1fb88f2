"""The gradients of a group norm and SiLU that a convolution applies as it reads its input.

The forward call has no tensor of its own: ``conv2d`` applies the gain and offset of
``group_norm_coefficients``. What it leaves for the backward are the statistics of the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.common.checks import (
    check_device,
    check_floating,
    check_no_gradient,
    check_same_kind,
    wide_dtype,
)
from fastdiff.ops import backend, reference
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

_ARGUMENTS = (
    "Tensor x, Tensor[] statistics, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? scale, Tensor? shift, bool silu, Tensor? skip"
)
torch.library.define(
    "fastdiff::norm_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastdiff::norm_backward_in_place",
    f"(Tensor(a!) grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


class NormGradients(NamedTuple):
    """Gradients by :func:`norm_backward`; None for what was not given."""

    x: Tensor
    skip: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    skip: Tensor | None = None,
    in_place: bool = False,
) -> NormGradients:
    """Gradients of y = silu(GroupNorm(cat(x, skip)) * (1 + scale) + shift), given that of y.

    It is for what ``conv2d`` computes with the coefficients of ``group_norm_coefficients``, of
    which it takes the arguments. Statistics are not taken again. GroupNorm is Wu & He 2018
    (arXiv:1803.08494), whose gradient flows through the statistics as well; ``scale`` and ``shift``
    are ADM's adaptive group normalisation (arXiv:2105.05233, eq. 3).

    Args:
        grad: gradient of y, [N, C + C', H, W].
        x: [N, C, H, W]. Channels-last, grad, x and skip are read in place, also as views of some
            of the channels of another tensor; else they are copied.
        statistics: results of ``channel_statistics``, float64 [N, C, 2], of x and, if there is one,
            of skip. Empty without a norm.
        num_groups: groups that share statistics; must divide C + C'. 0 for a SiLU without a norm,
            which has neither statistics nor weight, bias, scale or shift.
        weight: gain [C + C'], of the dtype of x or float32 (float64 beside float64), which its
            gradient then has too; or None for 1.
        bias: offset [C + C'], with dtypes as for ``weight``, or None for 0.
        eps: added to the variance.
        scale: [N or 1, C + C'], with dtypes as for ``weight``, or None for 0.
        shift: [N or 1, C + C'], with dtypes as for ``weight``, or None for 0.
        silu: whether SiLU was applied.
        skip: [N, C', H, W], or None.
        in_place: write the gradients of x and skip where ``grad`` lies, which must be
            channels-last, and return views of it.

    Returns:
        The gradients of x and skip, channels-last, and of each parameter that was given. Sums over
        pixels and images are the same for any number of threads.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: dtypes do not fit.
        ValueError: shapes, devices or layouts do not fit, num_groups does not divide the channels,
            or without groups there is something else than a SiLU.
    """
    options = (weight, bias, scale, shift)
    check_no_gradient(grad, x, skip, *statistics, *options)
    args = (
        grad, x, list(statistics), num_groups, weight, bias, eps, scale, shift, silu, skip,
    )  # fmt: skip
    _check(*args)
    kernel = x.is_cpu and backend.kernel_runs(x)
    with span("norm_backward"):
        if in_place:
            run = torch.ops.fastdiff.norm_backward_in_place if kernel else _reference_in_place
            of = run(*args)
            channels = x.shape[1]
            dx = grad.narrow(1, 0, channels)
            dskip = None if skip is None else grad.narrow(1, channels, skip.shape[1])
        else:
            ours = torch.ops.fastdiff if kernel else reference
            dx, dskip, *of = ours.norm_backward(*args)
    given = (None if value is None else found for value, found in zip(options, of, strict=True))
    return NormGradients(dx, None if skip is None else dskip, *given)


def _reference_in_place(grad: Tensor, x: Tensor, *others: object) -> tuple[Tensor, ...]:
    dx, dskip, *of = reference.norm_backward(grad, x, *others)  # type: ignore[arg-type]
    grad.copy_(torch.cat((dx, dskip), dim=1) if dskip.numel() else dx)
    return tuple(of)


def _check(
    grad: Tensor, x: Tensor, statistics: list[Tensor], num_groups: int, weight: Tensor | None,
    bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None, silu: bool,
    skip: Tensor | None,
) -> None:  # fmt: skip
    check_floating(x, "x")
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")
    n, channels, *spatial = x.shape
    if skip is not None:
        if skip.ndim != 4 or skip.shape != (n, skip.shape[1], *spatial):
            raise ValueError(
                f"skip must have the shape of x but for its channels, {tuple(x.shape)}, "
                f"got {tuple(skip.shape)}"
            )
        check_same_kind(skip, x, "skip", "x")
        channels += skip.shape[1]
    if grad.shape != (n, channels, *spatial):
        raise ValueError(f"grad must have shape {(n, channels, *spatial)}, got {tuple(grad.shape)}")
    check_same_kind(grad, x, "grad", "x")
    if not isinstance(num_groups, int) or num_groups < 0 or (num_groups and channels % num_groups):
        raise ValueError(
            f"num_groups must divide the channels: got {num_groups} groups for {channels} channels"
        )
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    options = (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift))
    if num_groups == 0:
        if not silu or statistics or any(value is not None for _, value in options):
            raise ValueError(
                "without groups there is a SiLU and nothing else, neither statistics nor weight, "
                "bias, scale or shift"
            )
        return
    _check_statistics(statistics, x, n, channels)
    for name, value in options:
        if value is None:
            continue
        shapes = [(channels,)] if name in ("weight", "bias") else [(n, channels), (1, channels)]
        if value.shape not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]}, got {tuple(value.shape)}")
        wide = wide_dtype(x.dtype)
        if value.dtype not in (x.dtype, wide):
            raise TypeError(
                f"{name} must be {wide} or of the dtype of x, {x.dtype}, got {value.dtype}"
            )
        check_device(value, x, name, "x")


def _check_statistics(statistics: list[Tensor], x: Tensor, n: int, channels: int) -> None:
    for value in statistics:
        if value.ndim != 3 or value.shape != (n, value.shape[1], 2):
            raise ValueError(f"statistics must have shape [{n}, C, 2], got {tuple(value.shape)}")
        if value.dtype != torch.float64:
            raise TypeError(f"statistics must be float64, got {value.dtype}")
        check_device(value, x, "statistics", "x")
    found = sum(value.shape[1] for value in statistics)
    if not statistics or found != channels:
        raise ValueError(f"statistics must be of {channels} channels, got {found}")


@torch.library.register_fake("fastdiff::norm_backward")
def _fake(  # type: ignore[no-untyped-def]
    grad, x, statistics, num_groups, weight, bias, eps, scale, shift, silu, skip
):
    check_devices(x, grad, *statistics, weight, bias, scale, shift, skip)

    def like(value):  # type: ignore[no-untyped-def]
        return torch.empty_like(value, memory_format=torch.channels_last)

    dskip = x.new_empty(0) if skip is None else like(skip)
    return like(x), dskip, *_fake_parameters(x, weight, bias, scale, shift)


@torch.library.register_fake("fastdiff::norm_backward_in_place")
def _fake_in_place(  # type: ignore[no-untyped-def]
    grad, x, statistics, num_groups, weight, bias, eps, scale, shift, silu, skip
):
    check_devices(x, grad, *statistics, weight, bias, scale, shift, skip)
    return _fake_parameters(x, weight, bias, scale, shift)


def _fake_parameters(x: Tensor, *options: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(
            0 if value is None else value.shape, dtype=(x if value is None else value).dtype
        )
        for value in options
    )
