"""Which algorithm computes a convolution of given sizes, and what memory its weight takes."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.compiler.choose import timings
from fastdiff.compiler.choose.timings import NAMES, Sizes
from fastdiff.ops.conv2d import output_size
from fastdiff.ops.conv2d import packed_bytes as kernel_bytes

PRECISIONS = {"fast": NAMES, "strict": ("plain", "direct")}
TILES = 16  # of F(4x4), below which its transforms and its weights' 36 planes do not pay
# PyTorch's convolution must be that much quicker than ours: what ours do on the way, the norm and
# the additions, are passes of their own beside it.
# And Strassen's than the direct one, and phases than winograd4, whose weights take less memory: 4/7
# and 0.36 of it.
WANTED = {"plain": 0.8, "strassen": 0.98, "phases4": 0.95}


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
    found = estimates([sizes], names, measured)[0]
    return min(reversed(names), key=lambda name: cost(found, name))


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
    """About how long each algorithm takes, from the sizes alone."""
    k, c, *kernel = sizes.weight
    height, width = output_size(sizes.x[2:], kernel, sizes.stride, sizes.padding, sizes.upsample)
    pixels = sizes.x[0] * height * width
    unit = 1e-11 * pixels * k * c * kernel[0] * kernel[1]
    shares = {"plain": 1.0, "direct": 0.75, "winograd2": 0.5, "winograd4": 0.35}
    shares |= {"strassen": 0.7, "phases4": 0.27}
    if min(k, c) < 256 or pixels < 256:
        shares["strassen"] = 0.8
    if min(k, c) < 16:
        shares["winograd2"], shares["winograd4"], shares["phases4"] = 0.9, 0.95, 0.95
    elif pixels < 16 * TILES:
        shares["winograd4"] = shares["phases4"] = 0.6
    return {name: shares[name] * unit for name in sizes.among(NAMES)}


def cost(row: dict[str, float], name: str) -> float:
    """Seconds of an algorithm, with what it is at a disadvantage."""
    return row[name] / WANTED.get(name, 1.0)


def packed_bytes(name: str, weight: Sequence[int]) -> int:
    """Bytes of what ``conv2d_pack`` gives for a weight [K, C, R, S]; none for ``plain``."""
    return 0 if name == "plain" else kernel_bytes(weight, name)
