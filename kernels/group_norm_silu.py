"""y = silu(GroupNorm(v) (1 + scale) + shift) + residual, where v = cat(x, skip) + add.

Layout: [N, C, P] channels-first or channels-last, y like x. The concatenation of x and skip is
never written, and ``add`` is added to the means instead of the values. S is the bytes of x and
skip:

    one pass    reads S, writes S: the ideal, 2 S          (3 S with a residual)
    split       reads 2 S, writes S                        (4 S with a residual)
    statistics  given: reads S, writes S                   (3 S with a residual)

PyTorch's group_norm and silu move 5 S: statistics, normalise, activate. In one pass, a program
computes whole groups. It keeps them in registers where they fit; otherwise it reads them again,
usually from a cache (``group_norm_plan`` decides). Split, there are three kernels: statistics of
channels over spans of pixels; for each group their combination in float64, which gives four
coefficients per channel; and a streaming kernel that applies the coefficients. The streaming kernel
takes the tiles in reverse order, because the last ones read are still in the second-level cache.

Tiles are runs of channels, not groups: so groups of any number of channels (10, 20, 40 in Stable
Diffusion) are read in vectors of 16 bytes. Statistics are computed per channel, and summed over the
channels of a group with a mask [GROUPS, CHANNELS].

A mean is kept as two numbers of float32, subtracted one after the other: so v - mean keeps all its
digits for a mean of 10,000 and a deviation of 0.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.channel_statistics import (
    merge,
    no_statistics,
    span_statistics,
    store_statistics,
    two_sum,
)
from fastdiff.kernels.channel_tiles import (
    activation,
    addresses,
    affine,
    centred,
    load_row,
    load_tile,
    memory_format,
    power_of_two,
    rows,
    whole_vectors,
)
from fastdiff.kernels.group_norm_plan import plan, split
from fastdiff.kernels.group_norm_silu_backward import group_norm_silu_backward
from fastdiff.kernels.launch import launch

__all__ = ["group_norm_silu", "group_norm_silu_backward"]


@triton.jit
def _write(
    tile, low, lower, gain, offset, residual, y, image, channels, pixels, first_channel,
    first_pixel, j, i, mask, NHWC: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = silu(((x - low) - lower) gain + offset) + residual, rounded once."""
    z = centred(tile, low, lower, y) * gain[:, None] + offset[:, None]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    if residual is not None:
        at = addresses(residual, image, channels, pixels, first_channel, first_pixel, j, i, NHWC)
        z += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = addresses(y, image, channels, pixels, first_channel, first_pixel, j, i, NHWC)
    tl.store(at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _one_pass(
    x, skip, weight, bias, add, scale, shift, residual, y, mean_out, rstd_out,
    channels, skip_channels, pixels, groups, group_size, add_row, scale_row, shift_row, eps,
    TILE_GROUPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    RESIDENT: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(groups, TILE_GROUPS)
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    first_group = program % tiles * TILE_GROUPS
    width = TILE_GROUPS * group_size
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
        width = whole_vectors(width, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    first_channel = program % tiles * width
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = first_channel + j
    inside = (j < width) & (c < total)

    # All loads come first, so that no load waits for a computation.
    if RESIDENT:
        mask = inside[:, None] & (i < pixels)[None, :]
        tile = load_tile(
            x, skip, image, channels, skip_channels, pixels, first_channel, 0, j, i, mask, NHWC
        )
    added = load_row(add, image * add_row, c, inside, 0.0)
    gain, offset = affine(weight, bias, scale, shift, image, c, inside, scale_row, shift_row)

    # Statistics of the tile's channels.
    if RESIDENT:
        _n, mean, remainder, m2 = span_statistics(tile, mask, pixels, axis=1)
    else:
        count, mean, remainder, m2 = no_statistics(CHANNELS)
        for first in range(0, pixels, PIXELS):
            mask = inside[:, None] & (first + i < pixels)[None, :]
            tile = load_tile(
                x, skip, image, channels, skip_channels, pixels, first_channel, first, j, i, mask,
                NHWC,
            )  # fmt: skip
            some = tl.minimum(pixels - first, PIXELS)
            n, a, b, d = span_statistics(tile, mask, some, axis=1)
            count, mean, remainder, m2 = merge(count, mean, remainder, m2, n, a, b, d)

    # Statistics of the tile's groups; the pivot is the mean of the channels' means.
    mean, rest = two_sum(mean, added)
    remainder += rest
    g = tl.arange(0, GROUPS)
    member = (j // group_size)[None, :] == g[:, None]
    values = pixels * 1.0
    pivot = tl.sum(tl.where(member, mean[None, :], 0.0), 1) / group_size
    deviation = (mean[None, :] - pivot[:, None]) + remainder[None, :]
    deviation = tl.where(member, deviation, 0.0)
    rest = tl.sum(deviation, 1) / group_size
    squares = tl.where(member, m2[None, :], 0.0) + deviation * deviation * values
    variance = tl.sum(squares, 1) / (values * group_size) - rest * rest
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(variance, 0.0) + eps)
    at = image * groups + first_group + g
    mine = (g < TILE_GROUPS) & (first_group + g < groups)
    tl.store(mean_out + at, pivot.to(tl.float64) + rest.to(tl.float64), mask=mine)
    tl.store(rstd_out + at, rstd.to(tl.float64), mask=mine)

    # Coefficients of the tile's channels.
    low, lower = two_sum(tl.sum(tl.where(member, pivot[:, None], 0.0), 0), -added)
    lower += tl.sum(tl.where(member, rest[:, None], 0.0), 0)
    gain *= tl.sum(tl.where(member, rstd[:, None], 0.0), 0)

    if RESIDENT:
        _write(
            tile, low, lower, gain, offset, residual, y, image, total, pixels, first_channel, 0,
            j, i, mask, NHWC, SILU,
        )  # fmt: skip
    else:
        for first in range(0, pixels, PIXELS):
            mask = inside[:, None] & (first + i < pixels)[None, :]
            tile = load_tile(
                x, skip, image, channels, skip_channels, pixels, first_channel, first, j, i, mask,
                NHWC,
            )  # fmt: skip
            _write(
                tile, low, lower, gain, offset, residual, y, image, total, pixels, first_channel,
                first, j, i, mask, NHWC, SILU,
            )  # fmt: skip


@triton.jit
def _statistics(
    x, skip, statistics, channels, skip_channels, pixels, spans, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Statistics of each channel over spans of ``steps`` tiles of pixels: float32 [N, S, 4, C]."""
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    across = tl.cdiv(total, CHANNELS)
    program = tl.program_id(0)
    first_channel = program % across * CHANNELS
    span = program // across % spans
    image = (program // across // spans).to(tl.int64)
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = first_channel + j
    count, mean, remainder, m2 = no_statistics(CHANNELS)
    for step in range(steps):
        first = (span * steps + step) * PIXELS
        mask = (c < total)[:, None] & (first + i < pixels)[None, :]
        tile = load_tile(
            x, skip, image, channels, skip_channels, pixels, first_channel, first, j, i, mask, NHWC
        )
        some = tl.maximum(tl.minimum(pixels - first, PIXELS), 0)
        n, a, b, d = span_statistics(tile, mask, some, axis=1)
        count, mean, remainder, m2 = merge(count, mean, remainder, m2, n, a, b, d)
    store_statistics(
        statistics, image, span, spans, total, c, c < total, count, mean, remainder, m2
    )


@triton.jit
def _combine(
    statistics, weight, bias, add, scale, shift, mean_out, rstd_out, coefficients,
    channels, spans, groups, group_size, add_row, scale_row, shift_row, eps,
    CHANNELS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Statistics of one group from those of its channels' spans, and its channels' coefficients.

    Chan et al.'s formula (see channel_statistics) in float64, with the mean of the first channel's
    first span as the pivot, in an order that depends on the shapes alone.
    """
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    j = tl.arange(0, CHANNELS)
    c = program % groups * group_size + j
    inside = j < group_size
    added = load_row(add, image * add_row, c, inside, 0.0).to(tl.float64)
    image_start = statistics + image * spans * 4 * channels
    pivot = tl.load(image_start + channels + program % groups * group_size).to(tl.float64)
    counts = tl.zeros([CHANNELS, SPANS], tl.float64)
    sums = tl.zeros([CHANNELS, SPANS], tl.float64)
    squares = tl.zeros([CHANNELS, SPANS], tl.float64)
    for first in range(0, spans, SPANS):
        span = first + tl.arange(0, SPANS)
        mask = inside[:, None] & (span < spans)[None, :]
        at = image_start + (span.to(tl.int64) * 4 * channels)[None, :] + c[:, None]
        count = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        mean = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        mean += tl.load(at + 2 * channels, mask=mask, other=0.0).to(tl.float64)
        m2 = tl.load(at + 3 * channels, mask=mask, other=0.0).to(tl.float64)
        deviation = mean - pivot + added[:, None]
        counts += count
        sums += count * deviation
        squares += tl.where(count > 0.0, m2 + count * deviation * deviation, 0.0)
    values = tl.sum(counts)
    rest = tl.sum(sums) / values
    mean = pivot + rest
    variance = tl.maximum(tl.sum(squares) / values - rest * rest, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_out + program, mean)
    tl.store(rstd_out + program, rstd)

    low = (mean - added).to(tl.float32)
    lower = (mean - added - low.to(tl.float64)).to(tl.float32)
    gain, offset = affine(weight, bias, scale, shift, image, c, inside, scale_row, shift_row)
    gain *= rstd.to(tl.float32)
    at = coefficients + image * 4 * channels + c
    tl.store(at, low, mask=inside)
    tl.store(at + channels, lower, mask=inside)
    tl.store(at + 2 * channels, gain, mask=inside)
    tl.store(at + 3 * channels, offset, mask=inside)


@triton.jit
def _apply(
    x, skip, coefficients, residual, y, channels, skip_channels, pixels, spans,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    across = tl.cdiv(total, CHANNELS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % across * CHANNELS
    first = program // across % spans * PIXELS
    image = (program // across // spans).to(tl.int64)
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = first_channel + j
    inside = c < total
    mask = inside[:, None] & (first + i < pixels)[None, :]
    tile = load_tile(
        x, skip, image, channels, skip_channels, pixels, first_channel, first, j, i, mask, NHWC
    )
    start = image * 4 * total
    low = load_row(coefficients, start, c, inside, 0.0)
    lower = load_row(coefficients, start + total, c, inside, 0.0)
    gain = load_row(coefficients, start + 2 * total, c, inside, 0.0)
    offset = load_row(coefficients, start + 3 * total, c, inside, 0.0)
    _write(
        tile, low, lower, gain, offset, residual, y, image, total, pixels, first_channel, first,
        j, i, mask, NHWC, SILU,
    )  # fmt: skip


def group_norm_silu(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastdiff.ops.group_norm_silu``: y, mean and rstd (both float64 [N, num_groups])."""
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    if skip is not None:
        skip = skip.contiguous(memory_format=layout) if skip.shape[1] else None
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    a = activation(x, skip)
    mean = x.new_empty((a.images, num_groups), dtype=torch.float64)
    rstd = torch.empty_like(mean)
    shape = (a.images, a.all_channels, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (add, add_row), (scale, scale_row), (shift, shift_row) = rows(add), rows(scale), rows(shift)
    channels, group_size = a.all_channels, a.all_channels // num_groups
    small = (weight, bias, add, scale, shift)
    strides = (add_row, scale_row, shift_row)
    tiles = plan(a, num_groups, 1)
    if tiles.groups and statistics is None:
        launch(
            _one_pass,
            (a.images * -(-num_groups // tiles.groups),),
            x, skip, *small, residual, y, mean, rstd,
            a.channels, a.skip_channels, a.pixels, num_groups, group_size, *strides, eps,
            TILE_GROUPS=tiles.groups, GROUPS=power_of_two(tiles.groups), CHANNELS=tiles.channels,
            PIXELS=tiles.pixels, RESIDENT=tiles.steps == 1, NHWC=a.nhwc,
            VECTOR=a.vector(tiles.groups * group_size), SILU=silu, num_warps=tiles.warps,
        )  # fmt: skip
        return y, mean, rstd

    tiles = split(a, 1)
    across = -(-channels // tiles.channels)
    vector = a.vector(tiles.channels)
    if statistics is None:
        statistics = mean.new_empty((a.images, tiles.spans, 4, channels), dtype=torch.float32)
        launch(
            _statistics,
            (a.images * tiles.spans * across,),
            x, skip, statistics, a.channels, a.skip_channels, a.pixels, tiles.spans,
            tiles.steps, CHANNELS=tiles.channels, PIXELS=tiles.pixels, NHWC=a.nhwc, VECTOR=vector,
            num_warps=tiles.warps,
        )  # fmt: skip
    statistics = statistics.contiguous()
    spans = int(statistics.shape[1])
    coefficients = mean.new_empty((a.images, 4, channels), dtype=torch.float32)
    side = power_of_two(group_size)
    launch(
        _combine,
        (a.images * num_groups,),
        statistics, *small, mean, rstd, coefficients,
        channels, spans, num_groups, group_size, *strides, eps,
        CHANNELS=side, SPANS=max(min(power_of_two(spans), 512 // side), 1), num_warps=4,
    )  # fmt: skip
    tall = -(-a.pixels // tiles.pixels)
    launch(
        _apply,
        (a.images * tall * across,),
        x, skip, coefficients, residual, y, a.channels, a.skip_channels, a.pixels, tall,
        CHANNELS=tiles.channels, PIXELS=tiles.pixels, NHWC=a.nhwc, VECTOR=vector, SILU=silu,
        num_warps=tiles.warps,
    )  # fmt: skip
    return y, mean, rstd
