"""Choose the algorithms of a convolution and of its gradients, by the sizes alone.

A step of training changes every weight, so each is packed anew for each use. A choice therefore
counts the time that packing takes, which is that of writing the packed weight and reading it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastdiff.compiler.choose.algorithms import PLAIN_SECONDS
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, Algorithm
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.norm_conv2d import PLAIN, Algorithms, turned

BYTE_SECONDS = 1e-10  # that a byte of a packed weight takes to be written and read


def choose(
    spec: ConvSpec, size: Sequence[int], dtype: torch.dtype, strict: bool = False
) -> Algorithms:
    """The algorithms of a convolution and of the gradients of its input and its weight.

    Args:
        spec: the convolution.
        size: number, height and width of its input images.
        dtype: of the images.
        strict: whether only algorithms with direct arithmetic are allowed.
    """
    images, *input_size = size
    pixels = images * _area(spec.output_size(input_size))
    products = pixels * math.prod(spec.weight)
    other = turned(spec)
    return Algorithms(
        result=_quickest(spec, pixels, products, dtype, strict),
        of_input=PLAIN
        if other is None
        else _quickest(other, images * _area(other.output_size(spec.output_size(input_size))),
                       products, dtype, strict),
        of_weight=_of_weight(spec, pixels, dtype, strict),
    )  # fmt: skip


def _quickest(spec: ConvSpec, pixels: int, products: int, dtype: torch.dtype, strict: bool) -> str:
    def seconds(row: Algorithm) -> float:
        packed = BYTE_SECONDS * conv2d_algorithms.packed_bytes(row.name, spec.weight)
        return PLAIN_SECONDS * products * row.cost.time(spec, pixels) + packed

    rows = [row for row in _allowed(strict) if conv2d_algorithms.suits(row.name, spec, dtype)]
    return min(reversed(rows), key=seconds).name


def _of_weight(spec: ConvSpec, pixels: int, dtype: torch.dtype, strict: bool) -> str:
    shares = {
        row.name: row.weight_gradient.time(spec, pixels)
        for row in _allowed(strict)
        if row.weight_gradient is not None
        and conv2d_algorithms.weight_gradient_refusal(row, spec, dtype) is None
    }
    return min(reversed(shares), key=shares.__getitem__)


def _allowed(strict: bool) -> list[Algorithm]:
    return [row for row in ALGORITHMS.values() if row.strict or not strict]


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]
