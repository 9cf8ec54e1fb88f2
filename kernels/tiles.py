"""How the streaming kernels cut a tensor into tiles, one tile per program.

A tensor is treated as rows of contiguous elements, [rows, columns]: a row is an image of a batch,
or the pixels of a channel, or the channels of a pixel. A program takes a tile of it, whose sides
are powers of two, as Triton requires.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format


class Tile(NamedTuple):
    """The tile [rows, columns] of a program, its warps, and the other constants of a launch."""

    rows: int
    columns: int
    warps: int
    unit: int  # a power of two that divides the columns, 16 at most
    grid: tuple[int]
    wide: bool

    @property
    def constants(self) -> dict[str, int | bool]:
        """The constants of a kernel that begins with `tile_at`."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "UNIT": self.unit,
            "WIDE": self.wide,
            "num_warps": self.warps,
        }


def tile(rows: int, columns: int, itemsize: int, narrowest: int = 1) -> Tile:
    """The tile for a kernel that reads a tensor [rows, columns] once.

    A thread takes two vectors of 16 bytes: with an SM full of threads enough bytes are then in
    flight. A tensor too small to give every SM several such programs of 4 warps gets tiles of as
    little as one vector a thread and one warp. A row whose length is no power of two is cut into
    pieces of the largest power of two that divides it, if these have at least 64 bytes: then no
    lane is idle.
    """
    rows, columns = int(rows), int(columns)
    vector = 16 // itemsize
    size = max(32 * vector, min(256 * vector, _floor(rows * columns // 528)))
    width = ceil_power(max(columns, 1))
    divisor = columns & -columns
    if divisor < width and divisor >= 4 * vector:
        width = divisor
    width = max(min(width, size), narrowest)
    height = min(max(size // width, 1), ceil_power(max(rows, 1)))
    return Tile(
        height,
        width,
        max(1, min(4, height * width // (32 * vector))),
        unit(columns),
        (-(-rows // height) * -(-columns // width),),
        max(rows, columns) >= 2**31,
    )


def unit(*lengths: int) -> int:
    """The largest power of two, 16 at most, that divides all lengths.

    A kernel that gets lengths in units is compiled for vectors as long as a unit. Without units
    Triton only distinguishes whether a length is a multiple of 16.
    """
    return math.gcd(16, *(int(length) for length in lengths))


def _floor(value: int) -> int:
    """The largest power of two up to ``value``, at least 1."""
    return 1 << max(value, 1).bit_length() - 1


def ceil_power(value: int) -> int:
    """The smallest power of two from ``value`` on."""
    return 1 << (value - 1).bit_length()


@triton.jit
def tile_at(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """This program's rows [ROWS, 1] and its first column, int32 unless WIDE.

    WIDE is for 2^31 or more rows or columns. A row's offset in memory is always int64.
    """
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    first_row = program // across
    first_column = program % across
    if WIDE:
        first_row = first_row.to(tl.int64)
        first_column = first_column.to(tl.int64)
    return (first_row * ROWS + tl.arange(0, ROWS))[:, None], first_column * COLUMNS


def dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """``x`` in dense memory, and its memory format: channels-last is kept, else contiguous."""
    memory_format = suggest_memory_format(x)
    return x.contiguous(memory_format=memory_format), memory_format
