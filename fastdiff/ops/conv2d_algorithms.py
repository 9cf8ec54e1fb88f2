"""The algorithms of the C++ kernel of conv2d, of which this module keeps no list of its own.

What they are called, what each is for, and what it costs, is told by the extension's list
(csrc/cpu/conv2d_algorithms.cpp). Without the extension the list is empty, and the reference
computes every convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.ops import backend
from fastdiff.ops.conv2d_spec import ConvSpec


@dataclass(frozen=True)
class Algorithm:
    """A row of the list.

    Attributes:
        number: its place, by which the operators know it.
        name: by which Python knows it.
        dtypes: of the images that it can read.
        packed_dtype: of the weight as ``conv2d_pack`` gives it.
        strict: whether it rounds no more than float32 sums of all products do.
        share: about the time that it takes, in times that PyTorch's convolution takes.
        narrow, narrow_share: the same with fewer filters or input channels than ``narrow``.
        small, small_share: else the same with fewer output pixels than ``small``.
        handicap: what its time is divided by wherever it is compared, 1 or less.
    """

    number: int
    name: str
    dtypes: frozenset[torch.dtype]
    packed_dtype: torch.dtype
    strict: bool
    share: float
    narrow: int
    narrow_share: float
    small: int
    small_share: float
    handicap: float

    def time(self, spec: ConvSpec, pixels: int) -> float:
        """About its time for a result of ``pixels`` in all, in times that PyTorch's takes."""
        if min(spec.filters, spec.channels) < self.narrow:
            return self.narrow_share
        return self.small_share if pixels < self.small else self.share


def _algorithm(number: int, row: dict[str, Any]) -> Algorithm:
    row["dtypes"] = frozenset(getattr(torch, name) for name in row["dtypes"])
    row["packed_dtype"] = getattr(torch, row["packed_dtype"])
    return Algorithm(number, **row)


_kernel = backend.extension
# By name, in the list's order: those that are usually the quickest last.
ALGORITHMS: dict[str, Algorithm] = {
    row["name"]: _algorithm(number, row)
    for number, row in enumerate(_kernel.conv2d_algorithms() if _kernel is not None else ())
}


def named(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        RuntimeError: there is none without the C++ extension, which is not here.
        ValueError: unknown name.
    """
    algorithm = ALGORITHMS.get(name)
    if algorithm is None and not ALGORITHMS:
        raise RuntimeError(f"algorithm {name!r} cannot run here: {backend.cpu_missing}")
    if algorithm is None:
        raise ValueError(f"unknown algorithm {name!r}, wanted one of {', '.join(ALGORITHMS)}")
    return algorithm


def numbered(number: int) -> Algorithm:
    """The algorithm of that number in the list; ValueError for a number that is not in it."""
    if not 0 <= number < len(ALGORITHMS):
        raise ValueError(f"unknown algorithm {number}, wanted 0 to {len(ALGORITHMS) - 1}")
    return list(ALGORITHMS.values())[number]


def refusal(algorithm: Algorithm, spec: ConvSpec, dtype: torch.dtype | None = None) -> str | None:
    """Why the algorithm cannot compute a convolution on this machine, or None if it can.

    Args:
        algorithm: of the list.
        spec: within the kernel's limits.
        dtype: of the images; None does not ask.
    """
    if dtype is not None and dtype not in algorithm.dtypes:
        return f"{algorithm.name} is not for {dtype}"
    return _refusal(algorithm.number, spec.encode())


def suits(name: str, spec: ConvSpec, dtype: torch.dtype | None = None) -> bool:
    """Whether the algorithm of that name can compute a convolution on this machine."""
    return within_limits(spec) and refusal(named(name), spec, dtype) is None


def computable(spec: ConvSpec) -> bool:
    """Whether some algorithm suits, or the reference, which suits all, is the only one here."""
    return not ALGORITHMS or any(suits(name, spec) for name in ALGORITHMS)


def within_limits(spec: ConvSpec) -> bool:
    """Whether the C++ kernel takes sizes and distances so large; without it none is too large."""
    return _kernel is None or _within_limits(spec.encode())


def packed_count(algorithm: Algorithm, weight: Sequence[int]) -> int:
    """How many elements ``conv2d_pack`` gives for a weight [K, C, R, S]."""
    return int(_kernel.conv2d_packed_count(algorithm.number, tuple(map(int, weight))))


def packed_bytes(name: str, weight: Sequence[int]) -> int:
    """How much memory the result of ``conv2d_pack`` takes for a weight [K, C, R, S]."""
    algorithm = named(name)
    return algorithm.packed_dtype.itemsize * packed_count(algorithm, weight)


# Dynamo cannot trace the extension's functions. What they tell of given numbers never changes.


@torch.compiler.assume_constant_result
def _refusal(number: int, numbers: tuple[int, ...]) -> str | None:
    return _kernel.conv2d_refusal(number, numbers)


@torch.compiler.assume_constant_result
def _within_limits(numbers: tuple[int, ...]) -> bool:
    return _kernel.conv2d_within_limits(numbers)
