"""Group normalisation as a gain and an offset for each image and channel.

Gain and offset are computed from the mean and variance of each channel. The operation that reads
the tensor next applies them, so the normalised tensor is never stored. Both operations here are for
inference on a CPU, and are used by ``fastdiff.compiler``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_no_gradient
from fastdiff.ops import backend, reference
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

torch.library.define("fastdiff::channel_statistics", "(Tensor x) -> Tensor")
torch.library.define(
    "fastdiff::group_norm_coefficients",
    "(Tensor[] statistics, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? scale, Tensor? shift) -> Tensor",
)


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and variance over the pixels of each channel of x [N, C, *spatial]: float64 [N, C, 2].

    ``conv2d`` can compute these statistics of its result itself. This operation is for a tensor
    that another operation has written.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: x is not floating point or not dense.
        ValueError: x has fewer than two dimensions.
    """
    check_no_gradient(x)
    check_floating(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...], got {tuple(x.shape)}")
    with span("channel_statistics"):
        return (torch.ops.fastdiff if kernel_runs(x) else reference).channel_statistics(x)


def group_norm_coefficients(
    statistics: Sequence[Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Gain and offset, float32 [N, 2, C], with which a x + b is
    GroupNorm(x) * (1 + scale) + shift.

    Args:
        statistics: the results of :func:`channel_statistics`, float64 [N, C_i, 2], for tensors of
            the same number of pixels, whose concatenation along the channels is normalised. C is
            the sum of C_i.
        num_groups: groups that share statistics; must divide C.
        weight: gain [C], or None for 1.
        bias: offset [C], or None for 0.
        eps: added to the variance.
        scale: [N, C], or None for 0 (ADM's adaptive normalisation, arXiv:2105.05233).
        shift: [N, C], or None for 0.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: the statistics are not float64.
        ValueError: shapes do not fit, or num_groups does not divide C.
    """
    check_no_gradient(*statistics, weight, bias, scale, shift)
    args = (list(statistics), num_groups, weight, bias, eps, scale, shift)
    _check(*args)
    ours = torch.ops.fastdiff if kernel_runs(statistics[0]) else reference
    with span("group_norm_coefficients"):
        return ours.group_norm_coefficients(*args)


def kernel_runs(x: Tensor) -> bool:
    """Whether the C++ kernels, and not the reference, compute on ``x``."""
    return x.is_cpu and backend.kernel_runs(x)


def _check(
    statistics: list[Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if not statistics:
        raise ValueError("statistics must be given for at least one tensor")
    for value in statistics:
        if value.ndim != 3 or value.shape != (statistics[0].shape[0], value.shape[1], 2):
            raise ValueError(f"statistics must have shape [N, C, 2], got {tuple(value.shape)}")
        if value.dtype != torch.float64:
            raise TypeError(f"statistics must be float64, got {value.dtype}")
    n, channels = statistics[0].shape[0], sum(value.shape[1] for value in statistics)
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups must divide the channels: got {num_groups} groups for {channels} channels"
        )
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    optional: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
    )
    for name, given, shape in optional:
        if given is None:
            continue
        if given.device != statistics[0].device:
            raise ValueError(f"{name} must be on {statistics[0].device}, got {given.device}")
        if given.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")


@torch.library.register_fake("fastdiff::channel_statistics")
def _fake_statistics(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2), dtype=torch.float64)


@torch.library.register_fake("fastdiff::group_norm_coefficients")
def _fake(  # type: ignore[no-untyped-def]
    statistics, num_groups, weight, bias, eps, scale, shift
):
    check_devices(*statistics, weight, bias, scale, shift)
    channels = sum(value.shape[1] for value in statistics)
    shape = (statistics[0].shape[0], 2, channels)
    return statistics[0].new_empty(shape, dtype=torch.float32)
