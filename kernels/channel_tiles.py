"""Tiles [channels, pixels] of activations in either layout, of one tensor or of two side by side.

An activation is [N, C, P] with P = pixels. Channels-first, the pixels of a channel are contiguous;
channels-last (NHWC), the channels of a pixel. A tile starts at a channel and a pixel of an image;
``j`` [CHANNELS] and ``i`` [PIXELS] count from there. Its sides are powers of two, and a mask
excludes elements outside the activation. Starts, and steps over the slow dimension, are 64-bit
numbers: tensors may have more than 2^31 elements.

Triton makes accesses as wide as it can prove to be aligned. So it must know that the runs along the
fast dimension are whole vectors. It finds out by itself where their length is a multiple of 16;
``whole_vectors`` tells it so for other lengths.

Two inputs, x [N, C1, P] and skip [N, C2, P], stand for their concatenation along the channels,
which is never made: each lane reads one of the two, with a mask.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format


class Activation(NamedTuple):
    """Sizes and layout of x and skip, on which a launch depends."""

    images: int
    channels: int  # of x
    skip_channels: int
    pixels: int
    itemsize: int
    nhwc: bool

    @property
    def all_channels(self) -> int:
        """Channels of both inputs."""
        return self.channels + self.skip_channels

    @property
    def size(self) -> int:
        """Bytes of both inputs together: S in the kernels' headers."""
        return self.images * self.all_channels * self.pixels * self.itemsize

    def vector(self, *starts: int) -> int:
        """The largest power of two up to 16 that divides every run along the fast dimension.

        ``starts`` are the channels at which tiles begin, or divisors of all these channels.
        """
        runs = (self.channels, self.skip_channels, *starts) if self.nhwc else (self.pixels,)
        return gcd(16, *runs)


def activation(x: Tensor, skip: Tensor | None) -> Activation:
    """The sizes and the layout of dense ``x`` [N, C1, ...] and ``skip`` [N, C2, ...]."""
    images, channels, *spatial = (int(size) for size in x.shape)
    pixels = 1
    for size in spatial:
        pixels *= size
    behind = 0 if skip is None else int(skip.shape[1])
    nhwc = memory_format(x) == torch.channels_last
    return Activation(images, channels, behind, pixels, x.element_size(), nhwc)


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last for a tensor that is so and is not contiguous too; else contiguous."""
    found = suggest_memory_format(x)
    return found if found == torch.channels_last else torch.contiguous_format


def rows(value: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor [N, C] whose channels are contiguous, and the distance between its rows."""
    if value is None:
        return None, 0
    if int(value.shape[1]) > 1 and value.stride(1) != 1:
        value = value.contiguous()
    return value, int(value.stride(0))


def power_of_two(value: int) -> int:
    """The smallest power of two from ``value`` on."""
    return 1 << max(value - 1, 0).bit_length()


@triton.jit
def whole_vectors(size, VECTOR: tl.constexpr):
    """``size``, a multiple of VECTOR, in a form that lets Triton know this."""
    return size // VECTOR * VECTOR


@triton.jit
def addresses(
    base, image, channels, pixels, first_channel, first_pixel, j, i, NHWC: tl.constexpr
):  # fmt: skip
    """Pointers [CHANNELS, PIXELS] into a tensor [N, channels, pixels]; ``image`` is int64."""
    if NHWC:
        start = base + ((image * pixels + first_pixel) * channels + first_channel)
        return (start + i.to(tl.int64) * channels)[None, :] + j[:, None]
    else:
        start = base + ((image * channels + first_channel) * pixels + first_pixel)
        return (start + j.to(tl.int64) * pixels)[:, None] + i[None, :]


@triton.jit
def load_tile(
    x, skip, image, channels, skip_channels, pixels, first_channel, first_pixel, j, i, mask,
    NHWC: tl.constexpr,
):  # fmt: skip
    """A tile of x and skip (or None) in the dtype of x, 0 outside the mask."""
    at = addresses(x, image, channels, pixels, first_channel, first_pixel, j, i, NHWC)
    if skip is None:
        return tl.load(at, mask=mask, other=0.0)
    else:
        first = (first_channel + j < channels)[:, None]
        behind = addresses(
            skip, image, skip_channels, pixels, first_channel - channels, first_pixel, j, i, NHWC
        )
        a = tl.load(at, mask=mask & first, other=0.0)
        b = tl.load(behind, mask=mask & (first == 0), other=0.0)
        return tl.where(first, a, b)


@triton.jit
def store_tile(
    x, skip, tile, image, channels, skip_channels, pixels, first_channel, first_pixel, j, i, mask,
    NHWC: tl.constexpr,
):  # fmt: skip
    """Write a tile to where ``load_tile`` reads it, rounded once."""
    at = addresses(x, image, channels, pixels, first_channel, first_pixel, j, i, NHWC)
    tile = tile.to(x.dtype.element_ty)
    if skip is None:
        tl.store(at, tile, mask=mask)
    else:
        first = (first_channel + j < channels)[:, None]
        behind = addresses(
            skip, image, skip_channels, pixels, first_channel - channels, first_pixel, j, i, NHWC
        )
        tl.store(at, tile, mask=mask & first)
        tl.store(behind, tile, mask=mask & (first == 0))


@triton.jit
def load_row(pointer, start, c, mask, DEFAULT: tl.constexpr):
    """Values of channels ``c`` as float32; DEFAULT outside the mask or without a tensor."""
    if pointer is None:
        return tl.full(c.shape, DEFAULT, tl.float32)
    else:
        return tl.load(pointer + start + c, mask=mask, other=DEFAULT).to(tl.float32)


@triton.jit
def centred(tile, low, lower, x):
    """x - mean in float32, for channels whose mean is ``low`` + ``lower``.

    ``lower`` is used for float32 data alone. In 16-bit data the deviations are no smaller than the
    rounding steps of the data, beside which the rounding of the mean to float32 is negligible.
    """
    tile = tile.to(tl.float32) - low[:, None]
    if x.dtype.element_ty == tl.float32:
        tile -= lower[:, None]
    return tile


@triton.jit
def affine(weight, bias, scale, shift, image, c, inside, scale_row, shift_row):
    """Gain and offset of channels: (n weight + bias) (1 + scale) + shift = n gain + offset."""
    factor = 1.0 + load_row(scale, image * scale_row, c, inside, 0.0)
    offset = load_row(bias, 0, c, inside, 0.0) * factor
    offset += load_row(shift, image * shift_row, c, inside, 0.0)
    return load_row(weight, 0, c, inside, 1.0) * factor, offset
