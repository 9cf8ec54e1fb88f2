"""The algorithms of the C++ kernel of conv2d.

Their names, the convolutions that each can compute, and their costs come from the extension's list
(csrc/cpu/conv2d_algorithms.cpp); this module has no copy. Without the extension the list is empty,
and the reference computes every convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.ops import backend
from fastdiff.ops.conv2d_spec import ConvSpec


@dataclass(frozen=True)
class Cost:
    """What an algorithm takes, for choices that are made without a clock.

    Attributes:
        share: estimate of its time, as a share of the time that PyTorch takes for the same.
        narrow, narrow_share: the share if filters or input channels are fewer than ``narrow``.
        small, small_share: else the share if output pixels are fewer than ``small``.
        handicap: its time is divided by this number, 1 or less, before it is compared.
    """

    share: float
    narrow: int
    narrow_share: float
    small: int
    small_share: float
    handicap: float

    def time(self, spec: ConvSpec, pixels: int) -> float:
        """Estimated time for a result of ``pixels`` in all, as a share of PyTorch's time."""
        if min(spec.filters, spec.channels) < self.narrow:
            return self.narrow_share
        return self.small_share if pixels < self.small else self.share


@dataclass(frozen=True)
class Algorithm:
    """A row of the list.

    Attributes:
        number: place in the list, by which the C++ operators know the algorithm.
        name: by which Python knows the algorithm.
        dtypes: dtypes of images that it can read.
        packed_dtype: dtype of the result of ``conv2d_pack``.
        strict: whether its rounding error is at most that of float32 sums of all products.
        cost: of the convolution.
        weight_gradient: cost of the gradient of the weight; None if the algorithm has none.
    """

    number: int
    name: str
    dtypes: frozenset[torch.dtype]
    packed_dtype: torch.dtype
    strict: bool
    cost: Cost
    weight_gradient: Cost | None


def _algorithm(number: int, row: dict[str, Any]) -> Algorithm:
    row["dtypes"] = frozenset(getattr(torch, name) for name in row["dtypes"])
    row["packed_dtype"] = getattr(torch, row["packed_dtype"])
    row["cost"] = Cost(**row["cost"])
    if row["weight_gradient"] is not None:
        row["weight_gradient"] = Cost(**row["weight_gradient"])
    return Algorithm(number, **row)


_kernel = backend.extension
# By name, in the order of the list, in which the usually fastest algorithms are last.
ALGORITHMS: dict[str, Algorithm] = {
    row["name"]: _algorithm(number, row)
    for number, row in enumerate(_kernel.conv2d_algorithms() if _kernel is not None else ())
}


def named(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        RuntimeError: there is no C++ extension.
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
        spec: the convolution, within the kernel's limits.
        dtype: of the images; None skips the check of the dtype.
    """
    if dtype is not None and dtype not in algorithm.dtypes:
        return f"{algorithm.name} is not for {dtype}"
    return _refusal(algorithm.number, spec.encode())


def weight_gradient_refusal(
    algorithm: Algorithm, spec: ConvSpec, dtype: torch.dtype | None = None
) -> str | None:
    """Why the algorithm cannot compute the gradient of a weight, or None if it can.

    Args as for :func:`refusal`.
    """
    if dtype is not None and dtype not in algorithm.dtypes:
        return f"{algorithm.name} is not for {dtype}"
    return _weight_gradient_refusal(algorithm.number, spec.encode())


def suits(name: str, spec: ConvSpec, dtype: torch.dtype | None = None) -> bool:
    """Whether the algorithm of that name can compute a convolution on this machine."""
    return within_limits(spec) and refusal(named(name), spec, dtype) is None


def computable(spec: ConvSpec, dtype: torch.dtype) -> bool:
    """Whether an algorithm can compute a convolution; True without the C++ extension."""
    return not ALGORITHMS or any(suits(name, spec, dtype) for name in ALGORITHMS)


def within_limits(spec: ConvSpec) -> bool:
    """Whether sizes and paddings are within the C++ kernel's limits; True without the extension."""
    return _kernel is None or _within_limits(spec.encode())


def packed_count(algorithm: Algorithm, weight: Sequence[int]) -> int:
    """Number of elements of ``conv2d_pack``'s result for a weight [K, C, R, S]."""
    return int(_kernel.conv2d_packed_count(algorithm.number, tuple(map(int, weight))))


def packed_bytes(name: str, weight: Sequence[int]) -> int:
    """Bytes of ``conv2d_pack``'s result for a weight [K, C, R, S]."""
    algorithm = named(name)
    return algorithm.packed_dtype.itemsize * packed_count(algorithm, weight)


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which imports Dynamo: seconds for every user."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Dynamo cannot trace the extension's functions. Their results depend on their arguments alone.


@_constant
def _refusal(number: int, numbers: tuple[int, ...]) -> str | None:
    return _kernel.conv2d_refusal(number, numbers)


@_constant
def _weight_gradient_refusal(number: int, numbers: tuple[int, ...]) -> str | None:
    return _kernel.conv2d_weight_gradient_refusal(number, numbers)


@_constant
def _within_limits(numbers: tuple[int, ...]) -> bool:
    return _kernel.conv2d_within_limits(numbers)
