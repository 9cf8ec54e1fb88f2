"""How denoising_loss is cut into programs: a pure function of shapes, so not of the card."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastdiff.kernels.group_norm_plan import CARD, LAUNCH, SM, SMS
from fastdiff.kernels.tiles import ceil_power, tile

NOISE = 8  # bytes that the card moves while it computes an element's noise from a seed
THREADS = 512  # of the largest program


class Plan(NamedTuple):
    """How the sums of squares are taken.

    A program takes ``loops`` tiles [rows, columns], of powers of two, one after the other: so much
    of ``rows`` images, all of it where ``pieces`` is 1.
    """

    rows: int
    columns: int
    loops: int
    pieces: int
    warps: int


@lru_cache(maxsize=4096)
def plan(images: int, elements: int, itemsize: int, read: int, seeded: bool) -> Plan:
    """Whole images or pieces, whichever is quicker by the estimates of ``group_norm_plan``.

    Args:
        images, elements: how many, and how many each has.
        itemsize: bytes of an element.
        read: activations that are read.
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
    """One image in tiles of up to 512 threads, 8 to 16 elements each, or several images that are
    smaller than a tile of ``tiles.tile``. Noise from a seed takes registers: then 8 elements at
    most.
    """
    columns = max(min(ceil_power(elements), THREADS * (8 if seeded else 16)), 4)
    rows = tile(images, columns, itemsize).rows if elements <= columns else 1
    warps = max(1, min(THREADS // 32, rows * columns // 256))
    return Plan(rows, columns, -(-elements // columns), 1, warps)


def _split(images: int, elements: int, itemsize: int, seeded: bool) -> Plan:
    """Pieces of an image, four programs an SM. A thread has at most two vectors of 16 bytes of a
    tile, or one where the noise is computed from a seed.
    """
    vector = 16 // itemsize
    largest = 128 * vector * (1 if seeded else 2)
    wanted = -(-images * elements // (4 * SMS))
    columns = min(max(ceil_power(wanted), 32 * vector), largest)
    loops = -(-wanted // columns)
    pieces = -(-elements // (columns * loops))
    return Plan(1, columns, loops, pieces, max(1, 4 * columns // largest))
