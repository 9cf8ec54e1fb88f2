"""y[n, c, 2h + i, 2w + j] = x[n, c, h, w] for i, j in 0, 1, and its gradient, the sum of the four.

Forward reads 1 S and writes 4 S for an input of S bytes; backward reads 4 S and writes 1 S. Both
are the minimum: an element is loaded once and stored four times from a register, or the reverse.
Channels-last, a tile is pixels by channels, and it is stored to four pixels each. In contiguous
memory a tile is rows by columns of images. Doubled along the row in registers, row r of all rows of
all channels and images is stored to the consecutive rows 2 r and 2 r + 1 of the output. The
gradient is summed in float32 in the same order in both layouts: first the two rows, then the two
columns. It is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import launch
from fastdiff.kernels.tiles import dense, tile, tile_at


@triton.jit
def _places(row, width):
    """The output pixels (int64) of pixel `row` of all images, channels-last: two above two."""
    above = 2 * (row.to(tl.int64) + (row // width).to(tl.int64) * width)
    below = above + 2 * width
    return above, above + 1, below, below + 1


@triton.jit
def _upsample_nearest2x(
    x,
    out,
    rows,
    units,
    width,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = units * UNIT
    row, first = tile_at(columns, ROWS, COLUMNS, WIDE)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + (row.to(tl.int64) * columns + column), inside)
    if CHANNELS_LAST:
        a, b, c, d = _places(row, width)
        tl.store(out + (a * columns + column), value, inside)
        tl.store(out + (b * columns + column), value, inside)
        tl.store(out + (c * columns + column), value, inside)
        tl.store(out + (d * columns + column), value, inside)
    else:
        double = (2 * first + tl.arange(0, 2 * COLUMNS))[None, :]
        inside = (row < rows) & (double < 2 * columns)
        value = tl.interleave(value, value)
        place = out + (row.to(tl.int64) * 4 * columns + double)
        tl.store(place, value, inside)
        tl.store(place + 2 * columns, value, inside)


@triton.jit
def _upsample_nearest2x_backward(
    grad,
    out,
    rows,
    units,
    width,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    columns = units * UNIT
    row, first = tile_at(columns, ROWS, COLUMNS, WIDE)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    if CHANNELS_LAST:
        a, b, c, d = _places(row, width)
        left = tl.load(grad + (a * columns + column), inside).to(tl.float32)
        right = tl.load(grad + (b * columns + column), inside).to(tl.float32)
        left += tl.load(grad + (c * columns + column), inside).to(tl.float32)
        right += tl.load(grad + (d * columns + column), inside).to(tl.float32)
    else:
        double = (2 * first + tl.arange(0, 2 * COLUMNS))[None, :]
        within = (row < rows) & (double < 2 * columns)
        place = grad + (row.to(tl.int64) * 4 * columns + double)
        both = tl.load(place, within).to(tl.float32)
        both += tl.load(place + 2 * columns, within).to(tl.float32)
        left, right = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    total = (left + right).to(out.dtype.element_ty)
    tl.store(out + (row.to(tl.int64) * columns + column), total, inside)


def upsample_nearest2x(x: Tensor) -> Tensor:
    """x [N, C, H, W] with every pixel repeated, [N, C, 2H, 2W], in the memory format of x."""
    x, memory_format = dense(x)
    images, channels, height, width = x.shape
    shape = (images, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    _launch(_upsample_nearest2x, x, out, x.shape, memory_format)
    return out


def upsample_nearest2x_backward(grad: Tensor) -> Tensor:
    """The gradient of x, [N, C, H, W], for ``grad`` of y, [N, C, 2H, 2W], in its memory format."""
    grad, memory_format = dense(grad)
    images, channels, height, width = grad.shape
    shape = (images, channels, height // 2, width // 2)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    _launch(_upsample_nearest2x_backward, grad, out, out.shape, memory_format)
    return out


def _launch(
    kernel: Any,
    source: Tensor,
    out: Tensor,
    shape: Sequence[int],
    memory_format: torch.memory_format,
) -> None:
    """Launch ``kernel``; ``shape`` is the shape of the smaller tensor, ``source`` or ``out``."""
    if out.numel() == 0:
        return
    images, channels, height, width = shape
    channels_last = memory_format == torch.channels_last
    rows, columns = (
        (images * height * width, channels)
        if channels_last
        else (images * channels * height, width)
    )
    tiles = tile(rows, columns, out.element_size())
    launch(
        kernel,
        tiles.grid,
        source,
        out,
        rows,
        columns // tiles.unit,
        width,
        CHANNELS_LAST=channels_last,
        **tiles.constants,
    )
