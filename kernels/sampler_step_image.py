"""The factor and the limit of a whole image that a sampler's step needs, and the model's output m.

    factor = 1 + rescale (std(m_c) / std(m) - 1)           where guidance is rescaled
    limit  = clamp(a quantile of |x0_x x + x0_m m|, 1, clip_max)    where x0 is thresholded

Device functions; one program calls them for one image. The standard deviations take one sweep over
the image, reading m_u and m_c: a tile in two passes over registers, and the tiles are merged by the
formula of Chan et al. in float64. The image's first value is subtracted from all, so that a
constant image has a deviation of exactly 0.

The quantile is exact, linear between two order statistics as in torch.quantile. The bits of |x0| as
integers have the order of the values, with NaN above all. A radix selection finds them in four
sweeps over x and m, eight bits per sweep; a fifth sweep finds the next larger value and the
largest. Bisection would need no histogram, but 31 sweeps. Each sweep computes the values again, by
one expression with explicit fma, so that it gets the same bits. Counts are integers, so their order
does not matter.
"""

import triton
import triton.language as tl


@triton.jit
def places(first, lane, channels, INTERLEAVED: tl.constexpr):
    """Offsets of the elements `first` + `lane` of an image's m from the offset that `begin` gives.

    INTERLEAVED: each pixel's channels are followed by as many variance channels. Offsets are 32-bit
    numbers, whatever `first` (int64) is.
    """
    place = lane
    if INTERLEAVED:
        begun = (first % channels).to(tl.int32)
        place += (begun + lane) // channels * channels
    return place


@triton.jit
def begin(first, channels, INTERLEAVED: tl.constexpr):
    """The offset in an image's m from which `places` counts the elements from `first` on."""
    place = first
    if INTERLEAVED:
        place += first // channels * channels
    return place


@triton.jit
def inside(first, end, lane, TILE: tl.constexpr):
    """Whether `first` + `lane` < `end`, compared in 32 bits."""
    return lane < tl.minimum(end - first, TILE).to(tl.int32)


@triton.jit
def guided(m_u, m_c, guidance):
    """m_u + guidance (m_c - m_u)."""
    return tl.fma(m_c - m_u, guidance, m_u)


@triton.jit
def model(model_out, conditional, place, mask, guidance, GUIDED: tl.constexpr):
    """m, guided but not rescaled, and m_c (which is m without guidance), in float32."""
    m = tl.load(model_out + place, mask=mask, other=0.0).to(tl.float32)
    m_c = m
    if GUIDED:
        m_c = tl.load(conditional + place, mask=mask, other=0.0).to(tl.float32)
        m = guided(m, m_c, tl.zeros_like(m) + guidance)
    return m, m_c


@triton.jit
def free_x0(x, m, x0_x, x0_m):
    """x0 before clipping or thresholding."""
    return tl.fma(x, tl.zeros_like(x) + x0_x, x0_m * m)


@triton.jit
def _add_tile(count, mean, square, found, value, mask):
    """Merge the `found` masked values of a tile by Chan et al.'s formula; scalars are float64."""
    tile_mean = tl.sum(tl.where(mask, value, 0.0), 0) / found.to(tl.float32)
    rest = tl.where(mask, value - tile_mean, 0.0)
    tile_square = tl.sum(rest * rest, 0).to(tl.float64)
    delta = tile_mean.to(tl.float64) - mean
    share = found / (count + found)
    return mean + delta * share, square + (tile_square + delta * delta * count * share)


@triton.jit
def rescale_factor(
    model_out, conditional, length, channels, guidance, rescale,
    INTERLEAVED: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """The factor on an image's m, float32; 1 for a constant image.

    `model_out` and `conditional` point to the image's m_u and m_c.
    """
    lane = tl.arange(0, SWEEP)
    start = tl.full((), 0, tl.int64)
    mask, place = inside(start, length, lane, SWEEP), places(start, lane, channels, INTERLEAVED)
    m, m_c = model(model_out, conditional, place, mask, guidance, True)
    origin = tl.sum(tl.where(lane == 0, m, 0.0), 0)
    origin_c = tl.sum(tl.where(lane == 0, m_c, 0.0), 0)
    count = tl.full((), 0, tl.float64)
    mean, square, mean_c, square_c = count, count, count, count
    for tile in range(tl.cdiv(length, SWEEP)):
        first = tl.cast(tile, tl.int64) * SWEEP
        mask = inside(first, length, lane, SWEEP)
        place = places(first, lane, channels, INTERLEAVED)
        start = begin(first, channels, INTERLEAVED)
        m, m_c = model(model_out + start, conditional + start, place, mask, guidance, True)
        found = tl.minimum(length - first, SWEEP).to(tl.float64)
        mean, square = _add_tile(count, mean, square, found, m - origin, mask)
        mean_c, square_c = _add_tile(count, mean_c, square_c, found, m_c - origin_c, mask)
        count += found
    ratio = tl.where(square == 0, 1.0, tl.sqrt(square_c / square))
    return (1 + rescale * (ratio - 1)).to(tl.float32)


@triton.jit
def _magnitude_bits(
    x, model_out, conditional, length, channels, guidance, factor, x0_x, x0_m, first,
    GUIDED: tl.constexpr, INTERLEAVED: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """The bits of |x0| of a tile, int32, and the mask of its elements in the image."""
    lane = tl.arange(0, SWEEP)
    mask = inside(first, length, lane, SWEEP)
    place = places(first, lane, channels, INTERLEAVED)
    x_t = tl.load((x + first) + lane, mask=mask, other=0.0).to(tl.float32)
    start = begin(first, channels, INTERLEAVED)
    m, _ = model(model_out + start, conditional + start, place, mask, guidance, GUIDED)
    magnitude = tl.abs(free_x0(x_t, m * factor, x0_x, x0_m))
    return magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask


@triton.jit
def threshold(
    x, model_out, conditional, length, channels, guidance, factor, x0_x, x0_m, quantile, clip_max,
    GUIDED: tl.constexpr, INTERLEAVED: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """The limit of dynamic thresholding of an image, float32; NaN if a value of x0 is NaN.

    `x`, `model_out` and `conditional` point to the image; `length` is int64.
    """
    position = tl.minimum(quantile, 1.0).to(tl.float64) * (length - 1).to(tl.float64)
    below = position.to(tl.int64)
    share = position - below.to(tl.float64)
    bins = tl.arange(0, 256)
    rank = below  # of the order statistic, among the values whose leading bits are `low`
    low = tl.full((), 0, tl.int32)
    equal = rank
    for digit in range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int64)
        for tile in range(tl.cdiv(length, SWEEP)):
            bits, mask = _magnitude_bits(
                x, model_out, conditional, length, channels, guidance, factor, x0_x, x0_m,
                tl.cast(tile, tl.int64) * SWEEP, GUIDED, INTERLEAVED, SWEEP,
            )  # fmt: skip
            begun = bits >> shift
            wanted = mask & ((begun >> 8) == low)
            histogram += tl.histogram(begun & 255, 256, mask=wanted).to(tl.int64)
        found = tl.sum((tl.cumsum(histogram, 0) <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < found, histogram, 0), 0)
        equal = tl.sum(tl.where(bins == found, histogram, 0), 0)
        low = (low << 8) | found
    above = tl.full((), 0x7FFFFFFF, tl.int32)
    largest = tl.full((), 0, tl.int32)
    for tile in range(tl.cdiv(length, SWEEP)):
        bits, mask = _magnitude_bits(
            x, model_out, conditional, length, channels, guidance, factor, x0_x, x0_m,
            tl.cast(tile, tl.int64) * SWEEP, GUIDED, INTERLEAVED, SWEEP,
        )  # fmt: skip
        above = tl.minimum(above, tl.min(tl.where(mask & (bits > low), bits, 0x7FFFFFFF), 0))
        largest = tl.maximum(largest, tl.max(tl.where(mask, bits, 0), 0))
    high = tl.where(rank + 1 < equal, low, above)
    low_value = low.to(tl.float32, bitcast=True).to(tl.float64)
    high_value = high.to(tl.float32, bitcast=True).to(tl.float64)
    between = low_value + share * (high_value - low_value)
    found_value = tl.where(share == 0, low_value, between).to(tl.float32)
    limit = tl.where(found_value < 1, 1.0, found_value)
    limit = tl.where(limit > clip_max, clip_max, limit)
    return tl.where(largest > 0x7F800000, float("nan"), limit)
