"""Which algorithm computes a convolution of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdiff.ops.conv2d import output_size, suits

PRECISIONS = ("fast", "strict")
TILES = 16  # of F(4x4), below which its transforms and its weights' 36 planes do not pay


def choose(
    size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    upsample: bool,
    dtype: torch.dtype,
    precision: str,
    threads: int,
) -> str:
    """The name of the algorithm, one of ``fastdiff.ops.conv2d.ALGORITHMS``.

    Called once for each size that a convolution sees.

    Args:
        size: [N, C, H, W] of what is read.
        weight_size: [K, C, R, S].
        stride: down and across.
        padding: above, below, left and right.
        upsample: whether pixels are read twice in both directions.
        dtype: of the images.
        precision: ``fast``, or ``strict`` for direct arithmetic alone.
        threads: that will compute.
    """
    k, channels, *kernel = weight_size
    if precision == "strict" or not suits("winograd4", kernel, stride) or min(k, channels) < 16:
        return "direct"
    height, width = output_size(size[2:], kernel, stride, padding, upsample)
    return "winograd4" if size[0] * height * width >= 16 * TILES else "winograd2"
