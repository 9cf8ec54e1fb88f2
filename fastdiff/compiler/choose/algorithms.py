"""Choose the algorithm for a convolution of given sizes; the memory of its packed weight.

The choices are the algorithms of ``ops.conv2d_algorithms``, and ``plain``: PyTorch's convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fastdiff.compiler.choose import timings
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.compiler.choose.timings import ALGORITHM_NAMES
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS
from fastdiff.ops.conv2d_spec import ConvSpec

PRECISIONS = {
    "fast": ALGORITHM_NAMES,
    "bf16": ALGORITHM_NAMES,
    "strict": ("plain", *(name for name, row in ALGORITHMS.items() if row.strict)),
}
PLAIN_SECONDS = 1e-11  # that PyTorch's convolution takes for a multiplication and an addition
# Seconds are divided by a handicap before they are compared. PyTorch's convolution has one because
# it leaves the norm and the additions to separate passes.
PLAIN_HANDICAP = 0.8
# So has an algorithm that packs a weight in a wider dtype than the images', where another packs it
# in theirs: a few percent are not worth several times the memory.
WIDE_HANDICAP = 0.85


def choose(
    sizes: Sizes,
    allowed: Sequence[str],
    measured: bool,
    seconds_per_byte: float = 0.0,
    held: Collection[str] = (),
) -> str:
    """Of the algorithms ``allowed`` the quickest that suits a convolution and is worth its memory.

    Args:
        sizes: of the convolution.
        allowed: from ``timings.ALGORITHM_NAMES``.
        measured: choose by measured times (each size is measured once), else by the sizes alone.
        seconds_per_byte: how many seconds a byte of packed weight must save.
        held: the algorithms for which the weight is packed already, and takes no more memory.

    Raises:
        RuntimeError: none suits it. ``plain`` suits every convolution.
    """
    names = sizes.among(allowed)
    if not names:
        raise RuntimeError(
            f"none of {', '.join(allowed) or 'no algorithms'} can compute the convolution "
            f"{sizes.key}, and its weight was dropped, so that it cannot be packed in another form"
        )
    if len(names) == 1:
        return names[0]
    seconds = estimates([sizes], names, measured)[0]

    def price(name: str) -> float:
        size = 0 if name in held else packed_bytes(name, sizes.spec)
        return cost(seconds, name, sizes.dtype) + seconds_per_byte * size

    return min(reversed(names), key=price)


def estimates(
    sizes: Sequence[Sizes], names: Sequence[str], measured: bool
) -> list[dict[str, float]]:
    """Seconds by algorithm for each of ``sizes``.

    Args:
        sizes: of convolutions.
        names: the algorithms to measure.
        measured: return measured times where they were reproducible, else estimates from the sizes.
    """
    if not measured:
        return [heuristic(size) for size in sizes]
    rows = zip(sizes, timings.seconds_by_algorithm(sizes, names), strict=True)
    return [row if timings.is_sure(size) else heuristic(size) for size, row in rows]


def heuristic(sizes: Sizes) -> dict[str, float]:
    """Estimated seconds by algorithm, from the sizes alone."""
    spec = sizes.spec
    height, width = spec.output_size(sizes.x[2:])
    pixels = sizes.x[0] * height * width
    plain = PLAIN_SECONDS * pixels
    for size in spec.weight:
        plain *= size
    return {
        name: plain if name == "plain" else plain * ALGORITHMS[name].cost.time(spec, pixels)
        for name in sizes.among(ALGORITHM_NAMES)
    }


def cost(seconds: dict[str, float], name: str, dtype: torch.dtype) -> float:
    """The seconds of an algorithm divided by its handicap, as algorithms are compared.

    Args:
        seconds: by algorithm.
        name: the algorithm.
        dtype: of the images.
    """
    if name == "plain":
        return seconds[name] / PLAIN_HANDICAP
    row = ALGORITHMS[name]
    wide = row.packed_dtype.itemsize > dtype.itemsize and _packs(dtype)
    return seconds[name] / (row.cost.handicap * (WIDE_HANDICAP if wide else 1.0))


def _packs(dtype: torch.dtype) -> bool:
    """Whether this machine has an algorithm for every convolution that packs weights in a dtype."""
    return ALGORITHMS[product(ConvSpec(1, 1), dtype)].packed_dtype == dtype


def product(spec: ConvSpec, dtype: torch.dtype) -> str:
    """The algorithm for linear layers of a few rows, which are not measured.

    It is the last strict one: a few rows gain nothing from fewer multiplications, but the products
    of bfloat16 read half the weight.
    """
    names = [name for name, row in ALGORITHMS.items() if row.strict]
    suited = [name for name in names if conv2d_algorithms.suits(name, spec, dtype)]
    return suited[-1] if suited else "plain"


def packed_bytes(name: str, spec: ConvSpec) -> int:
    """Bytes of the packed weight; 0 for ``plain``, and where the extension is not built."""
    if name == "plain" or not ALGORITHMS:
        return 0
    return conv2d_algorithms.packed_bytes(name, spec.weight)
