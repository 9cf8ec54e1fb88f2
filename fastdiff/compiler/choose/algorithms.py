"""Which algorithm computes a convolution of given sizes, and what memory its weight takes.

The algorithms of ``ops.conv2d_algorithms``, and ``plain``, PyTorch's own convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.compiler.choose import timings
from fastdiff.compiler.choose.timings import NAMES, Sizes
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS
from fastdiff.ops.conv2d_spec import ConvSpec

PRECISIONS = {
    "fast": NAMES,
    "strict": ("plain", *(name for name, row in ALGORITHMS.items() if row.strict)),
}
PRODUCT = "direct"  # what computes linear layers of a few rows, whatever the clock says
# As the algorithms' own handicaps: PyTorch's convolution is taken only if it is that much quicker,
# for it leaves the norm and the additions to passes of their own.
PLAIN_HANDICAP = 0.8


def choose(sizes: Sizes, allowed: Sequence[str], measured: bool) -> str:
    """The quickest of the algorithms ``allowed``, names of ``timings.NAMES``.

    Args:
        sizes: of the convolution.
        allowed: what it may use; ``plain`` suits every convolution.
        measured: look at the clock, once for each size, or only at the sizes.
    """
    names = sizes.among(allowed)
    if len(names) == 1:
        return names[0]
    seconds = estimates([sizes], names, measured)[0]
    return min(reversed(names), key=lambda name: cost(seconds, name))


def estimates(
    sizes: Sequence[Sizes], names: Sequence[str], measured: bool
) -> list[dict[str, float]]:
    """How long each algorithm takes, for each of ``sizes``: by the clock, where it could be
    believed, or else by the sizes alone.
    """
    if not measured:
        return [heuristic(size) for size in sizes]
    rows = zip(sizes, timings.of(sizes, names), strict=True)
    return [row if timings.is_sure(size) else heuristic(size) for size, row in rows]


def heuristic(sizes: Sizes) -> dict[str, float]:
    """About how many seconds each algorithm takes, from the sizes alone."""
    spec = sizes.spec
    height, width = spec.output_size(sizes.x[2:])
    pixels = sizes.x[0] * height * width
    plain = 1e-11 * pixels
    for size in spec.weight:
        plain *= size
    return {
        name: plain if name == "plain" else plain * ALGORITHMS[name].time(spec, pixels)
        for name in sizes.among(NAMES)
    }


def cost(seconds: dict[str, float], name: str) -> float:
    """The seconds of an algorithm, divided by its handicap: what is compared."""
    handicap = PLAIN_HANDICAP if name == "plain" else ALGORITHMS[name].handicap
    return seconds[name] / handicap


def packed_bytes(name: str, spec: ConvSpec) -> int:
    """Bytes that the packed weight takes; none for ``plain``, or where nothing is packed at all."""
    if name == "plain" or not ALGORITHMS:
        return 0
    return conv2d_algorithms.packed_bytes(name, spec.weight)
