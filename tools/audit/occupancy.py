"""How many warps of a kernel an SM can hold, of how many it has room for.

The rule is the one of NVIDIA's occupancy calculator: registers are given to a warp in units of 256
and lie in four quarters of the SM, shared memory is given to a block in units of 128 bytes with 1
KiB for the system on top, and what runs out first is the limit.
"""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
REGISTERS = 65536  # of an SM
QUARTERS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
SHARED_OF_THE_SYSTEM = 1024  # a block


class Multiprocessor(NamedTuple):
    """What an SM of an architecture has."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_of_a_block: int  # bytes, at most


ARCHITECTURES = {
    80: Multiprocessor(2048, 32, 164 * 1024, 163 * 1024),
    90: Multiprocessor(2048, 32, 228 * 1024, 227 * 1024),
    100: Multiprocessor(2048, 32, 228 * 1024, 227 * 1024),
}


def blocks(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that an SM of ``arch`` holds at a time.

    Args:
        arch: 80, 90 or 100.
        threads: of a block.
        registers: of a thread.
        shared: bytes a block asks for, static and dynamic.
    """
    sm = ARCHITECTURES[arch]
    warps = -(-threads // WARP)
    if shared > sm.shared_of_a_block or warps * WARP > 1024:
        return 0
    limits = [sm.blocks, sm.threads // (warps * WARP)]
    if registers:
        of_a_warp = _round_up(registers * WARP, REGISTER_UNIT)
        limits.append(REGISTERS // QUARTERS // of_a_warp * QUARTERS // warps)
    limits.append(sm.shared // (_round_up(shared, SHARED_UNIT) + SHARED_OF_THE_SYSTEM))
    return min(limits)


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """The warps that an SM holds of such blocks, as a part of those it has room for."""
    warps = -(-threads // WARP)
    return blocks(arch, threads, registers, shared) * warps * WARP / ARCHITECTURES[arch].threads


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
