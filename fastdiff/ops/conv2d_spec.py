"""The description of a convolution, apart from its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 2**63 - 1  # the largest integer in the arguments of an operator


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with the operations fused into it, for images of any size.

    Attributes:
        filters: K of the weight [K, C, R, S].
        channels: C of the weight.
        kernel: R and S, the weight's height and width.
        stride: vertical and horizontal.
        padding: rows and columns of zeros above, below, left and right of the convolution's input.
        upsample: the convolution's input is upsampled 2x (nearest neighbour).
        silu: SiLU is applied to the input, after the norm if there is one.
        gated: the result is a * gelu(b), [a, b] being the halves of the K channels.
        statistics: the mean and variance of the result are computed too.

    Raises:
        ValueError: a size or a stride below 1, or a negative padding.
    """

    filters: int
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    upsample: bool = False
    silu: bool = False
    gated: bool = False
    statistics: bool = False

    def __post_init__(self) -> None:
        if len(self.kernel) != 2 or not all(1 <= size <= _MOST for size in self.weight):
            raise ValueError(f"wanted a weight [K, C, R, S] of 1 or more each, got {self.weight}")
        strides = len(self.stride) == 2 and all(1 <= step <= _MOST for step in self.stride)
        if not strides or len(self.padding) != 4 or not all(0 <= p <= _MOST for p in self.padding):
            raise ValueError(
                "wanted two strides of 1 or more and four paddings of 0 or more, "
                f"got {self.stride} and {self.padding}"
            )

    def __str__(self) -> str:
        return (
            f"a weight of {self.weight}, stride {self.stride}, padding {self.padding} and "
            f"upsample {self.upsample}"
        )

    @property
    def weight(self) -> tuple[int, ...]:
        """The weight's shape [K, C, R, S]."""
        return (self.filters, self.channels, *self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of the result depends on the one input pixel at its place."""
        plain = self.stride == (1, 1) and not any(self.padding) and not self.upsample
        return self.kernel == (1, 1) and plain

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result for images of height and width ``size``."""
        up, (top, bottom, left, right) = 2 if self.upsample else 1, self.padding
        return (
            (up * size[0] + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (up * size[1] + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    def encode(self) -> tuple[int, ...]:
        """The numbers that the operator ``fastdiff::conv2d`` takes (csrc/cpu/conv2d_spec.cpp)."""
        flags = (self.upsample, self.silu, self.gated, self.statistics)
        return (*self.weight, *self.stride, *self.padding, *map(int, flags))

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> ConvSpec:
        """The convolution that :meth:`encode` made ``numbers`` of."""
        k, c, r, s, down, across, top, bottom, left, right, *flags = numbers
        padding = (top, bottom, left, right)
        return cls(k, c, (r, s), (down, across), padding, *map(bool, flags))
