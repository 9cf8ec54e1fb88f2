"""How group_norm_silu and its backward are cut into programs: pure functions of shape and layout.

Plans never depend on the device, so that results do not either. The constants below are rough
estimates for a card of 132 SMs (Hopper; Ampere and Blackwell have 108 to 148).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastdiff.kernels.channel_tiles import Activation, power_of_two

SMS = 132
CARD = 3_000_000  # bytes per microsecond that the whole card reads and writes
SM = 50_000  # bytes per microsecond that a single program reads and writes
LAUNCH = 2  # microseconds that another kernel costs: the previous one drains, and it starts

THREADS = 512  # threads of the largest program: each has 128 registers


class Plan(NamedTuple):
    """Tiles [channels, pixels] for a program, powers of two, and its warps.

    ``groups`` > 0: one pass. A program has ``groups`` whole groups and walks over all their pixels
    in ``steps`` tiles; if there is one tile, it stays in registers.
    ``groups`` = 0: split. Statistics are taken of ``spans`` spans of ``steps`` tiles each.
    """

    groups: int
    channels: int
    pixels: int
    steps: int
    spans: int
    warps: int


@lru_cache(maxsize=4096)
def plan(a: Activation, num_groups: int, tensors: int) -> Plan:
    """The faster of the two plans, by the estimates above.

    In one pass, memory is read once and written once, and each program computes whole groups.
    Groups that do not fit in registers are read again, usually from the first-level cache. Few
    large groups would leave most of the card idle: then the plan is split, all SMs compute
    statistics, and everything is read a second time.

    Args:
        a: sizes and layout.
        num_groups: number of groups of all channels.
        tensors: how many activations are read and kept: 1 forward, 2 backward (x and grad).
    """
    whole = one_pass(a, num_groups, tensors)
    programs = a.images * -(-num_groups // whole.groups)
    group_size = a.all_channels // num_groups
    share = min(whole.groups, num_groups) * group_size * a.pixels * a.itemsize
    reads = tensors * (1 if whole.steps == 1 else 2)
    alone = -(-programs // SMS) * share * (reads + 1) / SM
    once = max(a.size * (tensors + 1) / CARD, alone)
    twice = a.size * (2 * tensors + 1) / CARD + 2 * LAUNCH
    return whole if once <= twice else split(a, tensors)


def one_pass(a: Activation, num_groups: int, tensors: int) -> Plan:
    """The plan in which each program computes whole groups.

    Channels-first a group is contiguous, so a program has one group. Channels-last a program reads
    a slice of every pixel, so it has the fewest groups whose channels are whole vectors of 16 bytes
    and at least a sector of 32 bytes. These are doubled up to the 64 bytes that memory delivers at
    a time, as long as the tile stays small and there are still two programs per SM.
    """
    group_size = a.all_channels // num_groups
    groups = 1
    if a.nhwc:
        aligned = a.all_channels * a.itemsize % 16 == 0
        while groups < num_groups and (
            (aligned and groups * group_size * a.itemsize % 16)
            or groups * group_size * a.itemsize < 32
        ):
            groups += 1
        while (
            groups * group_size * a.itemsize < 64
            and 2 * groups <= num_groups
            and a.images * (num_groups // (2 * groups)) >= 2 * SMS
            and 2 * groups * group_size * a.pixels * tensors <= 8192
        ):
            groups *= 2
    channels = power_of_two(groups * group_size)
    pixels = power_of_two(a.pixels)
    held, threads = _held(tensors), THREADS
    if tensors > 1 and not a.nhwc and channels * pixels <= 2 * held * threads:
        held *= 2  # registers suffice without a loop and with few channels per thread
    if channels * pixels > held * threads:
        held = min(held, 64 // a.itemsize)  # in a loop, addresses take registers too
        if tensors > 1 and a.nhwc and a.itemsize == 2:
            threads //= 2  # sums of 8 channels, and their coefficients, take registers too
        pixels = max(held * threads // channels, 1)
    steps = -(-a.pixels // pixels)
    return Plan(groups, channels, pixels, steps, 0, _warps(channels * pixels, held))


def split(a: Activation, tensors: int) -> Plan:
    """The plan in which statistics are computed per span of pixels, in tiles of any channels.

    Rows of a tile are 128 bytes channels-last, and up to 1024 pixels channels-first: long enough
    for whole cache lines, short enough that the last tile wastes little. Small tensors get smaller
    tiles, until every SM has two programs. In large tensors a span is several tiles: four programs
    per SM remain, and fewer statistics are written and read. Channels-last a span is at least so
    long that the statistics are a twentieth of all bytes moved.
    """
    held = _held(tensors)
    largest = 256 * held
    elements = largest
    total = a.images * a.all_channels * a.pixels
    while elements > 64 * held and total < 2 * SMS * elements:
        elements //= 2
    shortest = 1
    if a.nhwc:
        shortest = 128 // tensors
        channels = min(power_of_two(a.all_channels), 128 // a.itemsize)
        elements = max(elements, min(channels * shortest, largest))
        pixels = elements // channels
    else:
        pixels = min(power_of_two(a.pixels), 1024, elements)
        channels = elements // pixels
    tiles = -(-a.pixels // pixels)
    programs = a.images * -(-a.all_channels // channels) * tiles
    steps = min(max(programs // (4 * SMS), -(-shortest // pixels), 1), 8)
    spans = -(-tiles // steps)
    return Plan(0, channels, pixels, steps, spans, _warps(elements, held))


def _held(tensors: int) -> int:
    """How many elements of an activation a thread holds.

    Forward: as many as keep enough bytes in flight. Backward an element takes four numbers: those
    of two activations, and those of the next tile or of the sums. Channels-last a thread also has
    the coefficients of 8 channels.
    """
    return 32 if tensors == 1 else 8


def _warps(elements: int, held: int) -> int:
    return min(max(elements // (32 * held), 1), THREADS // 32)
