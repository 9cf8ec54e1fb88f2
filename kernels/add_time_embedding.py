"""y = x + emb, an embedding [N, C] added to every pixel of x [N, C, P].

Reads 1 S and writes 1 S for an activation of S bytes, the minimum, plus the embedding, which every
tile reads through the caches. In contiguous memory a row of x is the pixels of a channel, to which
one number is added. Channels-last, a row is the channels of a pixel, to which the embedding of the
image is added. The sum is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.launch import launch
from fastdiff.kernels.tiles import dense, tile, tile_at


@triton.jit
def _add_time_embedding(
    x,
    emb,
    out,
    rows,
    units,
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
    value = tl.load(x + offset, inside, other=0).to(tl.float32)
    if CHANNELS_LAST:
        added = tl.load(emb + (row // pixels * columns + column), inside, other=0)
    else:
        added = tl.load(emb + row, row < rows, other=0)
    tl.store(out + offset, (value + added.to(tl.float32)).to(out.dtype.element_ty), inside)


def add_time_embedding(x: Tensor, emb: Tensor) -> Tensor:
    """``fastdiff.ops.add_time_embedding``."""
    x, memory_format = dense(x)
    out = torch.empty_like(x, memory_format=memory_format)
    if out.numel() == 0:
        return out
    images, channels = x.shape[:2]
    pixels = x.numel() // (images * channels)
    # With one pixel both layouts are the same memory; channels-last gives longer rows.
    channels_last = pixels == 1 or memory_format != torch.contiguous_format
    rows, columns = (images * pixels, channels) if channels_last else (images * channels, pixels)
    tiles = tile(rows, columns, x.element_size())
    launch(
        _add_time_embedding,
        tiles.grid,
        x,
        emb.contiguous(),
        out,
        rows,
        columns // tiles.unit,
        pixels,
        CHANNELS_LAST=channels_last,
        **tiles.constants,
    )
    return out
