"""How denoising_loss is cut into programs: a function of shapes alone, never of the device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastdiff.kernels.group_norm_plan import CARD, LAUNCH, SM, SMS
from fastdiff.kernels.tiles import ceil_power, tile

NOISE = 8  # bytes that memory moves in the time of computing one element's noise from a seed
THREADS = 512  # threads of the largest program


class Plan(NamedTuple):
    """How the sums of squares are computed.

    A program takes ``loops`` tiles [rows, columns], whose sides are powers of two, one after the
    other. They are one of the ``pieces`` of ``rows`` images.
    """

    rows: int
    columns: int
    loops: int
    pieces: int
    warps: int


@lru_cache(maxsize=4096)
def plan(images: int, elements: int, itemsize: int, read: int, seeded: bool) -> Plan:
    """Whole images or pieces, whichever is faster by the estimates of ``group_norm_plan``.

    Args:
        images: number of images.
        elements: number of elements of an image.
        itemsize: bytes of an element.
        read: number of activations that are read.
        seeded: whether the noise is computed from a seed.
    """
    whole = _whole(images, elements, itemsize, seeded)
    share = elements * (read * itemsize + NOISE * seeded)
    programs = -(-images // whole.rows)
    alone = -(-programs // SMS) * whole.rows * share / SM
    everything = images * share / CARD
    once, twice = max(everything, alone), everything + LAUNCH
    return whole if once <= twice else _split(images, elements, itemsize, seeded)


def _whole(images: int, elements: int, itemsize: int, seeded: bool) -> Plan:
    """The plan for whole images.

    A program takes one image in tiles of up to 512 threads with 8 to 16 elements each (8 at most
    with noise from a seed, which takes registers), or several images that are smaller than a tile
    of ``tiles.tile``.
    """
    columns = max(min(ceil_power(elements), THREADS * (8 if seeded else 16)), 4)
    rows = tile(images, columns, itemsize).rows if elements <= columns else 1
    warps = max(1, min(THREADS // 32, rows * columns // 256))
    return Plan(rows, columns, -(-elements // columns), 1, warps)


def _split(images: int, elements: int, itemsize: int, seeded: bool) -> Plan:
    """The plan for pieces of images: four programs per SM.

    A thread has at most two vectors of 16 bytes of a tile, or one where the noise is computed from
    a seed.
    """
    vector = 16 // itemsize
    largest = 128 * vector * (1 if seeded else 2)
    wanted = -(-images * elements // (4 * SMS))
    columns = min(max(ceil_power(wanted), 32 * vector), largest)
    loops = -(-wanted // columns)
    pieces = -(-elements // (columns * loops))
    return Plan(1, columns, loops, pieces, max(1, 4 * columns // largest))
