"""Statistics of channels over spans of pixels: device functions for kernels that compute them.

For a channel and a span of pixels: their count n, the mean and M2, the sum of squared deviations
from the mean. In memory they are float32 [N, S, 4, C]: span s of S holds the pixels s L to
min((s + 1) L, P) - 1 with L = ceil(P / S), and its planes are

    0   n
    1   the mean, rounded to float32
    2   the remainder: the mean is plane 1 + plane 2, to about twice float32's digits
    3   M2

A span without pixels is all zeros. Channels are contiguous, so that neighbouring lanes write
neighbouring words in either layout of the activation.

The statistics of a tile are computed in two passes over registers, without a memory access: the
mean, then the deviations from it. The sum of the deviations, which would be zero without rounding,
gives the remainder and corrects M2 (Chan et al. 1983, "Algorithms for computing the sample
variance", eq. 1.7). So data of mean 10,000 and deviation 0.1 keeps its digits. Tiles are merged by
eq. 2.1 of the same paper in the order of the loop, with the first tile's mean as the pivot: nothing
depends on which program is faster, and nothing is added atomically.

How to use them, in a kernel that walks over the pixels of a span, tile by tile [channels, pixels]:

    count, mean, remainder, m2 = no_statistics(CHANNELS)
    for ...:
        n, a, b, d = span_statistics(tile, mask, pixels_in_tile, axis=1)
        count, mean, remainder, m2 = merge(count, mean, remainder, m2, n, a, b, d)
    store_statistics(statistics, image, span, spans, channels, c, m, count, mean, remainder, m2)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_statistics(tile, mask, count, axis: tl.constexpr):
    """Count, mean, remainder and M2 of a tile along an axis, one value for each channel.

    Args:
        tile: values of any dtype.
        mask: which elements count; broadcasts to the tile. Other elements may have any value.
        count: how many elements of each channel count, a scalar; 0 gives all zeros.
        axis: the axis of the pixels.
    """
    tile = tile.to(tl.float32)
    count = count + 0.0
    share = 1.0 / tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(mask, tile, 0.0), axis) * share
    deviation = tl.where(mask, tile - tl.expand_dims(mean, axis), 0.0)
    rest = tl.sum(deviation, axis)
    remainder = rest * share
    m2 = tl.maximum(tl.sum(deviation * deviation, axis) - rest * remainder, 0.0)
    return tl.zeros_like(mean) + count, mean, remainder, m2


@triton.jit
def no_statistics(CHANNELS: tl.constexpr):
    """The statistics of no pixels, with which a loop begins."""
    zero = tl.zeros([CHANNELS], tl.float32)
    return zero, zero, zero, zero


@triton.jit
def merge(count, mean, remainder, m2, other_count, other_mean, other_remainder, other_m2):
    """Statistics of two sets of pixels together. The mean of the first set is kept as a pivot."""
    mean = tl.where(count == 0.0, other_mean, mean)
    remainder = tl.where(count == 0.0, other_remainder, remainder)
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = (other_mean - mean) + (other_remainder - remainder)
    delta = tl.where(other_count == 0.0, 0.0, delta)
    return total, mean, remainder + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def two_sum(a, b):
    """a + b rounded to float32, and the exact rounding error (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def store_statistics(
    statistics, image, span, spans, channels, c, mask, count, mean, remainder, m2
):  # fmt: skip
    """Write the four planes of channels ``c`` [CHANNELS] for a span of an image (int64)."""
    mean, remainder = two_sum(mean, remainder)
    start = statistics + (image * spans + span) * 4 * channels + c
    tl.store(start, count, mask=mask)
    tl.store(start + channels, mean, mask=mask)
    tl.store(start + 2 * channels, remainder, mask=mask)
    tl.store(start + 3 * channels, m2, mask=mask)
