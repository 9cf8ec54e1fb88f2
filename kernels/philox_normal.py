"""Standard normal noise [N, ...] from counters, one stream per image (kernels/philox.py).

Writes 1 S for noise of S bytes, the minimum, and reads 16 bytes per image. Arithmetic limits the
speed: about 55 instructions per element in contiguous memory, where a counter serves four elements,
and about 120 in channels-last memory, where each element needs a counter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.kernels import philox
from fastdiff.kernels.launch import launch
from fastdiff.kernels.tiles import tile, tile_at


@triton.jit(do_not_specialize=["row"])
def _philox_normal(
    seed,
    row,
    out,
    images,
    units,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    elements = units * UNIT
    image, first = tile_at(elements, ROWS, COLUMNS, WIDE)
    key_low, key_high, number = philox.stream(seed, image, image < images)
    z = philox.normal_tile(
        first, key_low, key_high, number, row, pixels, CHANNELS, COLUMNS, CHANNELS_LAST
    )
    column = (first + tl.arange(0, COLUMNS))[None, :]
    inside = (image < images) & (column < elements)
    tl.store(out + (image.to(tl.int64) * elements + column), z.to(out.dtype.element_ty), inside)


def philox_normal(seed: Tensor, row: int, out: Tensor) -> None:
    """Fill ``out`` [N, ...] with the noise of ``fastdiff.ops.philox_normal`` at ``row``."""
    if out.numel() == 0:
        return
    memory_format = suggest_memory_format(out)
    whole = out.is_contiguous(memory_format=memory_format)
    noise = out if whole else out.new_empty(out.shape)
    channels_last = whole and not out.is_contiguous()
    images = out.shape[0]
    elements = out.numel() // images
    channels = out.shape[1] if channels_last else 1
    tiles = tile(images, elements, out.element_size(), narrowest=4)
    launch(
        _philox_normal,
        tiles.grid,
        seed.contiguous(),
        row - 2**32 if row >= 2**31 else row,  # int32 for every row, with the same 32 bits
        noise,
        images,
        elements // tiles.unit,
        elements // channels,
        CHANNELS=channels,
        CHANNELS_LAST=channels_last,
        **tiles.constants,
    )
    if not whole:
        out.copy_(noise)
