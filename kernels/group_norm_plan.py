"""How group_norm_silu and its backward are cut into programs: pure functions of shape and layout.

Nothing here looks at the device, so that results do not depend on the card: the numbers below stand
for one of 132 SMs (Hopper; 108 to 148 in its neighbours) and are only as good as that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastdiff.kernels.channel_tiles import Activation, power_of_two

SMS = 132
CARD = 3_000_000  # bytes that the card moves in a microsecond
SM = 50_000  # bytes that one program alone gets from and to memory in a microsecond
LAUNCH = 2  # microseconds that a further kernel costs: it starts, and the card runs empty before

THREADS = 512  # of the largest program: 128 registers are left for each


class Plan(NamedTuple):
    """Tiles [channels, pixels] for a program, powers of two, and its warps.

    ``groups`` > 0: one pass. A program has so many whole groups and walks over all their pixels in
    ``steps`` tiles; a single one stays in the registers.
    ``groups`` = 0: split. Statistics are those of spans of ``steps`` tiles, ``spans`` of them.
    """

    groups: int
    channels: int
    pixels: int
    steps: int
    spans: int
    warps: int


@lru_cache(maxsize=4096)
def plan(a: Activation, num_groups: int, tensors: int) -> Plan:
    """The quicker of the two ways, by the estimates above.

    Args:
        a: sizes and layout.
        num_groups: groups of all channels together.
        tensors: how many activations are read and kept: 1 forward, 2 backward (x and grad).

    In one pass, memory is read once and written once, by programs that are alone with their groups;
    if these do not fit in the registers they are read again, from the first-level cache as a rule.
    Where there are few groups, and large ones, that leaves most of the card idle: then all SMs take
    statistics, and read everything a second time.
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
    """Whole groups a program.

    Channels-first a group is contiguous: one group. Channels-last a program reads a slice of every
    pixel: the fewest groups whose channels are whole vectors of 16 bytes and at least a sector of
    32 bytes, and doubled up to 64 bytes, which memory delivers at a time, as long as the tile stays
    small and there are two programs an SM all the same.
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
        held *= 2  # without a loop, and with few channels a thread, there are registers for that
    if channels * pixels > held * threads:
        held = min(held, 64 // a.itemsize)  # in a loop, addresses take registers too
        if tensors > 1 and a.nhwc and a.itemsize == 2:
            threads //= 2  # so do sums of 8 channels, and their coefficients
        pixels = max(held * threads // channels, 1)
    steps = -(-a.pixels // pixels)
    return Plan(groups, channels, pixels, steps, 0, _warps(channels * pixels, held))


def split(a: Activation, tensors: int) -> Plan:
    """Tiles of any channels.

    Rows of 128 bytes channels-last, of up to 1024 pixels channels-first: long enough for whole
    cache lines, short enough that little of a last tile is cut off. Small tensors get smaller
    tiles, until every SM has two programs; in large ones a span is several tiles, which leaves four
    programs an SM, and less statistics to write and read. Channels-last a span is at least so long
    that these are a twentieth of all that is moved.
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
    """Elements of an activation for a thread.

    Forward as many as keep enough bytes on their way to memory. Backward each is four numbers: of
    two activations, and of what comes next or is summed; channels-last a thread has the
    coefficients of 8 channels besides.
    """
    return 32 if tensors == 1 else 8


def _warps(elements: int, held: int) -> int:
    return min(max(elements // (32 * held), 1), THREADS // 32)
