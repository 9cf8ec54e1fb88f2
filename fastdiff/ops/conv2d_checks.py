"""What ``conv2d`` and its gradient check alike, beside what a tensor must have in any operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import check_device, check_same_kind
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, Algorithm
from fastdiff.ops.conv2d_spec import ConvSpec


def check_skip(skip: Tensor | None, x: Tensor) -> int:
    """The channels of x and skip together; ValueError or TypeError if they do not fit.

    Args:
        skip: channels to concatenate, or None.
        x: [N, C, H, W].
    """
    if skip is None:
        return x.shape[1]
    n, channels, *size = x.shape
    if skip.ndim != 4 or skip.shape != (n, skip.shape[1], *size):
        raise ValueError(
            f"skip must have the shape of x but for its channels, {tuple(x.shape)}, "
            f"got {tuple(skip.shape)}"
        )
    check_same_kind(skip, x, "skip", "x")
    return channels + skip.shape[1]


def check_norm(norm: Tensor | None, x: Tensor, channels: int) -> None:
    """ValueError unless norm is float32 [N, 2, channels] on the device of x, or None."""
    if norm is None:
        return
    check_device(norm, x, "norm", "x")
    n = x.shape[0]
    if norm.dtype != torch.float32 or norm.shape != (n, 2, channels):
        raise ValueError(
            f"norm must be float32 [{n}, 2, {channels}], got {norm.dtype} {tuple(norm.shape)}"
        )


def checked_output_size(spec: ConvSpec, size: Sequence[int]) -> tuple[int, int]:
    """Height and width of the result; ValueError for images that are smaller than the kernel."""
    out = spec.output_size(size)
    if min(out) < 1:
        raise ValueError(f"images of {tuple(size)} are smaller than the kernel {list(spec.kernel)}")
    return out


def algorithm_number(
    name: str,
    spec: ConvSpec,
    dtype: torch.dtype | None,
    refusal: Callable[[Algorithm, ConvSpec, torch.dtype | None], str | None],
) -> int | None:
    """The algorithm's number, or None if only the reference can compute such a convolution.

    Args:
        name: of the algorithm.
        spec: the convolution.
        dtype: of the images; None if the reference computes.
        refusal: the function of ``conv2d_algorithms`` that says why it cannot be computed.

    Raises:
        ValueError: an unknown name, or the algorithm does not suit the convolution.
    """
    if not ALGORITHMS:
        return None
    algorithm = conv2d_algorithms.named(name)
    if not conv2d_algorithms.within_limits(spec):
        return None
    reason = refusal(algorithm, spec, dtype)
    if reason is not None:
        raise ValueError(f"{reason}, got {spec}")
    return algorithm.number
