"""Time the algorithms of one convolution, on constants: times do not depend on the values."""

from __future__ import annotations

import contextlib
import math
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.ops import reference
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, packed_bytes

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

# Each algorithm is called until its two quickest calls agree within the ratio, at most so often.
MOST_CALLS, AGREEING_RATIO = 12, 1.15
SLOW_SECONDS = 0.02  # a call that takes longer is repeated once; the quicker of the two counts
# An algorithm whose best call took more than both ratio * best of all and these seconds is not
# called again. A first call may be slow for other reasons than the algorithm.
HOPELESS, HOPELESS_FIRST = (1.5, 0.002), (2.0, 0.005)
# A model's weights are more than any cache holds, so that each comes from memory at every call. So
# no call is given those bytes of the constants that one of the last calls has read.
COLD_BYTES = 128 << 20
_LINE = 32  # bfloat16 numbers of a cache line
_op = torch.ops.fastdiff.conv2d.default


def weight_bytes(sizes: Sizes, names: Sequence[str]) -> int:
    """Bytes of the largest form of a convolution's weight that ``measure`` reads."""
    return max(_bytes(sizes, name) for name in names)


def _bytes(sizes: Sizes, name: str) -> int:
    """Bytes of the weight that an algorithm reads."""
    if name == "plain":
        return sizes.dtype.itemsize * math.prod(sizes.spec.weight)
    return packed_bytes(name, sizes.spec.weight)


def constants(size: int) -> Tensor:
    """``size`` bytes of constants, as bfloat16, in large pages where the system has them.

    Every weight of every measured convolution is a part of them. To pack a weight of its own for
    each would take longer than to time the algorithm.
    """
    count = (size + 1) // 2
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.full((count,), 0.5, dtype=torch.bfloat16, device="cpu")
    memory = mmap.mmap(-1, max(2 * count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=count).fill_(0.5)


@dataclass
class _Times:
    """Seconds of the calls of one algorithm.

    Attributes:
        first: of the first call, for which neither code nor input may be in the caches.
        calm: of later calls that the scheduler did not interrupt, in ascending order.
        disturbed: the least of later calls that it did interrupt.
    """

    first: float
    calm: list[float] = field(default_factory=list)
    disturbed: float = math.inf

    @property
    def least(self) -> float:
        if self.calm:
            return self.calm[0]
        return self.disturbed if math.isfinite(self.disturbed) else self.first

    @property
    def agree(self) -> bool:
        """Whether the two quickest calls confirm each other."""
        if self.calm and self.calm[0] > SLOW_SECONDS:
            return True
        return len(self.calm) > 1 and self.calm[1] <= AGREEING_RATIO * self.calm[0]

    def note(self, seconds: float, calm: bool) -> None:
        if seconds > SLOW_SECONDS:  # a time slice more or less is small beside it
            seconds, calm = min(seconds, self.first), True
        if calm:
            self.calm = sorted([*self.calm, seconds])
        else:
            self.disturbed = min(seconds, self.disturbed)


def measure(sizes: Sizes, names: Sequence[str], weights: Tensor) -> tuple[dict[str, float], bool]:
    """Time algorithms, in turns, so that other work of the machine slows all of them alike.

    Args:
        sizes: of the convolution.
        names: the algorithms; those that are usually the quickest last.
        weights: at least ``weight_bytes`` of ``constants``.

    Returns:
        Seconds by algorithm, and whether the times of the quickest were reproducible.
    """
    times: dict[str, _Times] = {}
    with torch.inference_mode():
        n, c, h, w = sizes.x
        x = torch.full((n, h, w, c), 0.5, dtype=sizes.dtype, device="cpu").permute(0, 3, 1, 2)
        left = list(reversed(names))  # probably the quickest first, so that slow ones end early
        at = 0
        for turn in range(MOST_CALLS + 1):
            for name in left:
                before = _interruptions()
                count = _bytes(sizes, name) // weights.itemsize
                at = 0 if at + count > weights.numel() else at
                seconds = _time(sizes, name, x, weights[at : at + count])
                at += -(-count // _LINE) * _LINE
                if turn == 0:
                    times[name] = _Times(seconds)
                else:
                    # A thread that is preempted keeps the others waiting for a time slice.
                    times[name].note(seconds, calm=_interruptions() == before)
            best = min(of.least for of in times.values())
            ratio, least = HOPELESS_FIRST if turn == 0 else HOPELESS
            hopeless = max(ratio * best, least)
            left = [n for n in left if times[n].least <= hopeless and not times[n].agree]
    quickest = min(times, key=lambda name: times[name].least)
    return {name: of.least for name, of in times.items()}, times[quickest].agree


def _interruptions() -> int:
    """How often the scheduler has preempted a thread of this process."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _time(sizes: Sizes, name: str, x: Tensor, weight: Tensor) -> float:
    # SiLU stays: it costs each algorithm the same, but one of them is for nothing else.
    spec = replace(sizes.spec, gated=False, statistics=False)
    if name == "plain":
        weight = weight.view(sizes.dtype).view(spec.weight)
        begin = time.perf_counter()
        reference.conv2d(x, weight, spec)
        return time.perf_counter() - begin
    algorithm, numbers = ALGORITHMS[name], spec.encode()
    packed = weight.view(algorithm.packed_dtype)
    begin = time.perf_counter()
    _op(x, packed, numbers, algorithm.number)
    return time.perf_counter() - begin
