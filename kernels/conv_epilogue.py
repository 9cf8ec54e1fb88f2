"""y = x + bias[c] + emb[n, c] + residual, and the statistics of y that a norm needs.

The additions after a convolution of a U-Net in one pass: reads 1 S (2 S with a residual) and writes
1 S for an activation of S bytes, the minimum. The statistics, 16 bytes per channel and span, save
the next norm from reading y. The sum is computed in float32 and rounded once, and the statistics
are those of the rounded values (format: kernels/channel_statistics.py).

Without statistics, x is streamed as rows: a row is the pixels of a channel or, channels-last, the
channels of a pixel. With statistics, a program takes a span of pixels of a few channels of an
image, and walks over it in tiles that stay in registers while their mean and deviations are
computed. No sum crosses programs, so the result is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.channel_statistics import (
    merge,
    no_statistics,
    span_statistics,
    store_statistics,
)
from fastdiff.kernels.launch import launch
from fastdiff.kernels.tiles import ceil_power, dense, tile, tile_at, unit


@triton.jit
def _added(x, bias, emb, residual, offset, inside, channel, of_image, known):
    """The sum, float32. `channel` is c, and `of_image` is n C + c, the index in emb."""
    y = tl.load(x + offset, inside, other=0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, known, other=0).to(tl.float32)
    if emb is not None:
        y += tl.load(emb + of_image, known, other=0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + offset, inside, other=0).to(tl.float32)
    return y


@triton.jit
def _conv_epilogue(
    x,
    bias,
    emb,
    residual,
    out,
    rows,
    units,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = units * UNIT
    row, first = tile_at(columns, ROWS, COLUMNS, WIDE)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    offset = row.to(tl.int64) * columns + column
    inside = (row < rows) & (column < columns)
    if CHANNELS_LAST:
        of_image = row // pixels * columns + column
        y = _added(x, bias, emb, residual, offset, inside, column, of_image, inside)
    else:
        y = _added(x, bias, emb, residual, offset, inside, row % channels, row, row < rows)
    tl.store(out + offset, y.to(out.dtype.element_ty), inside)


@triton.jit
def _conv_epilogue_statistics(
    x,
    bias,
    emb,
    residual,
    out,
    statistics,
    channel_units,
    pixel_units,
    spans,
    length_units,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
):
    channels = channel_units * CHANNEL_UNIT
    pixels = pixel_units * PIXEL_UNIT
    length = length_units * PIXEL_UNIT
    across = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) // across
    span = part % spans
    image = (part // spans).to(tl.int64)
    c = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    begin = span.to(tl.int64) * length
    # Channels-last, tiles are [pixels, channels], else [channels, pixels].
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    channel = tl.expand_dims(c, axis)
    known = channel < channels
    count, mean, remainder, m2 = no_statistics(CHANNELS)
    for tile_first in range(0, length, PIXELS):
        within = tile_first + tl.arange(0, PIXELS)
        pixel = begin + tl.expand_dims(within, 1 - axis)
        here = (tl.expand_dims(within, 1 - axis) < length) & (pixel < pixels)
        if CHANNELS_LAST:
            offset = (image * pixels + pixel) * channels + channel
        else:
            offset = (image * channels + channel) * pixels + pixel
        inside = here & known
        of_image = image * channels + channel
        y = _added(x, bias, emb, residual, offset, inside, channel, of_image, known)
        rounded = y.to(out.dtype.element_ty)
        tl.store(out + offset, rounded, inside)
        left = tl.minimum(length, pixels - begin) - tile_first
        n, a, b, d = span_statistics(
            rounded.to(tl.float32), here, tl.minimum(tl.maximum(left, 0), PIXELS), axis
        )
        count, mean, remainder, m2 = merge(count, mean, remainder, m2, n, a, b, d)
    store_statistics(
        statistics, image, span, spans, channels, c, c < channels, count, mean, remainder, m2
    )


class Plan(NamedTuple):
    """The tile of a program that computes statistics, and its warps."""

    channels: int
    pixels: int
    warps: int


def plan(
    images: int, channels: int, length: int, spans: int, itemsize: int, channels_last: bool
) -> Plan:
    """The plan for spans of ``length`` pixels.

    A tile is at most 8 warps of four vectors of 16 bytes a thread: few enough registers for two
    programs per SM. Channels-last, it is 128 bytes of channels wide (a cache line), or the largest
    power of two that divides the channels. Channels-first, it is as many pixels of a span as fit,
    and as many channels as there is room for. If that gives fewer than 264 programs, a tile gets
    fewer channels, down to one vector for each thread of a warp and, channels-last, to 32 bytes,
    the smallest memory access.
    """
    vector = 16 // itemsize
    size = 1024 * vector
    longest = ceil_power(length)
    if channels_last:
        wide, least = min(ceil_power(channels), 8 * vector), 2 * vector
        divisor = channels & -channels
        if 4 * vector <= divisor < wide:
            wide = divisor
    else:
        wide, least = min(ceil_power(channels), max(size // longest, 1)), 1
    while wide > max(least, 32 * vector // longest) and images * spans * -(-channels // wide) < 264:
        wide //= 2
    pixels = min(longest, size // wide)
    return Plan(wide, pixels, max(1, min(8, wide * pixels // (64 * vector))))


def conv_epilogue(
    x: Tensor, bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, spans: int
) -> tuple[Tensor, Tensor]:
    """y and its statistics, float32 [N, spans, 4, C], or an empty tensor if ``spans`` is 0."""
    x, memory_format = dense(x)
    images, channels = x.shape[:2]
    shape = (images, spans, 4, channels) if spans else (0,)
    out = torch.empty_like(x, memory_format=memory_format)
    statistics = torch.empty(shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, statistics.zero_()
    pixels = x.numel() // (images * channels)
    added = (
        None if bias is None else bias.contiguous(),
        None if emb is None else emb.contiguous(),
        None if residual is None else residual.contiguous(memory_format=memory_format),
    )
    # With one pixel both layouts are the same memory; channels-last gives longer rows.
    channels_last = pixels == 1 or memory_format != torch.contiguous_format
    if spans:
        length = -(-pixels // spans)
        tiles = plan(images, channels, length, spans, x.element_size(), channels_last)
        launch(
            _conv_epilogue_statistics,
            (images * spans * -(-channels // tiles.channels),),
            x,
            *added,
            out,
            statistics,
            channels // unit(channels),
            pixels // unit(pixels, length),
            spans,
            length // unit(pixels, length),
            CHANNELS_LAST=channels_last,
            CHANNELS=tiles.channels,
            PIXELS=tiles.pixels,
            CHANNEL_UNIT=unit(channels),
            PIXEL_UNIT=unit(pixels, length),
            num_warps=tiles.warps,
        )
        return out, statistics
    rows, columns = (images * pixels, channels) if channels_last else (images * channels, pixels)
    streamed = tile(rows, columns, x.element_size())
    launch(
        _conv_epilogue,
        streamed.grid,
        x,
        *added,
        out,
        rows,
        columns // streamed.unit,
        channels,
        pixels,
        CHANNELS_LAST=channels_last,
        **streamed.constants,
    )
    return out, statistics
