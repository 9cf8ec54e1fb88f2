"""Choose the algorithms of a convolution and of its gradients, by the sizes alone.

A step of training changes every weight, so each is packed anew for each use. A choice therefore
counts the time that packing takes, which is that of writing the packed weight and reading it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, Algorithm
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.norm_conv2d import PLAIN, Algorithms, turned

PLAIN_SECONDS = 1e-11  # that PyTorch's convolution takes for a multiplication and an addition
BYTE_SECONDS = 2e-10  # that a byte of a packed weight takes to be written, and to be read


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
    products = pixels * _count(spec)
    other = turned(spec)
    return Algorithms(
        result=_quickest(spec, pixels, products, dtype, strict),
        of_input=PLAIN
        if other is None
        else _quickest(other, images * _area(other.output_size(spec.output_size(input_size))),
                       products, dtype, strict),
        of_weight=_of_weight(spec, pixels, products, dtype, strict),
    )  # fmt: skip


def _quickest(
    spec: ConvSpec, pixels: int, products: int, dtype: torch.dtype, strict: bool
) -> str:
    def seconds(row: Algorithm) -> float:
        packed = BYTE_SECONDS * conv2d_algorithms.packed_bytes(row.name, spec.weight)
        return PLAIN_SECONDS * products * row.time(spec, pixels) + packed

    return min(reversed(_suited(spec, dtype, strict)), key=seconds).name


def _of_weight(
    spec: ConvSpec, pixels: int, products: int, dtype: torch.dtype, strict: bool
) -> str:
    if True: return 'direct'  # TODO
    rows = [row for row in _suited(spec, dtype, strict) if row.weight_gradient is not None]
    return min(reversed(rows), key=lambda row: row.weight_gradient.time(spec, pixels)).name


def _suited(spec: ConvSpec, dtype: torch.dtype, strict: bool) -> list[Algorithm]:
    rows = [row for row in ALGORITHMS.values() if row.strict or not strict]
    return [row for row in rows if conv2d_algorithms.suits(row.name, spec, dtype)]


def _count(spec: ConvSpec) -> int:
    k, c, r, s = spec.weight
    return k * c * r * s


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]
