"""Gradients of y = silu(GroupNorm(v) (1 + scale) + shift) + residual, v = cat(x, skip) + add.

With xhat = (v - mean) rstd, gain = weight (1 + scale), z = xhat gain + bias (1 + scale) + shift and
dz = grad silu'(z), for each channel of an image, over its P pixels,

    A = sum dz        B = sum dz xhat        X = sum xhat

and for each group of D = P C / G values, over its channels, db = sum gain A / D and
ds = sum gain B / D:

    dx = rstd (gain dz - db - xhat ds)                  dadd = rstd (gain A - P db - X ds)
    dshift = A        dscale = weight B + bias A
    dbias = sum over images of (1 + scale) A            dweight = sum over images of (1 + scale) B

Layout: [N, C, P] channels-first or channels-last; grad has the channels of x and then those of
skip. S is the bytes of x and skip together:

    one pass    reads x and grad, writes dx: the ideal, 3 S
    split       reads x and grad twice, writes dx: 5 S

In one pass, a program computes whole groups. It keeps them in registers where they fit; otherwise
it reads them again, usually from a cache (``group_norm_plan`` decides). Split, there are three
kernels: the sums A, B and X of channels over spans of pixels; for each group their totals and all
gradients but dx; and dx, over the tiles in reverse order, because the last ones read are still in
the second-level cache. In both cases a small kernel adds up the parameters' gradients over the
images. The order of all sums depends on the shapes alone, and none is atomic. Tiles are runs of
channels, as in the forward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.channel_tiles import (
    activation,
    addresses,
    affine,
    centred,
    load_row,
    load_tile,
    memory_format,
    power_of_two,
    rows,
    store_tile,
    whole_vectors,
)
from fastdiff.kernels.group_norm_plan import plan
from fastdiff.kernels.launch import launch


@triton.jit
def _load(
    grad, x, skip, image, channels, skip_channels, pixels, first_channel, first, end, j, i, inside,
    NHWC: tl.constexpr,
):  # fmt: skip
    """The mask of a tile up to the pixel ``end``, and x and grad of the tile in their dtypes."""
    mask = inside[:, None] & ((first + i < pixels) & (first + i < end))[None, :]
    tile = load_tile(
        x, skip, image, channels, skip_channels, pixels, first_channel, first, j, i, mask, NHWC
    )
    total = channels + skip_channels
    at = addresses(grad, image, total, pixels, first_channel, first, j, i, NHWC)
    return mask, tile, tl.load(at, mask=mask, other=0.0)


@triton.jit
def _coefficients(
    mean, rstd, weight, bias, add, scale, shift, image, c, inside, groups, group_size, add_row,
    scale_row, shift_row,
):  # fmt: skip
    """The mean of channels as two numbers, and gain and offset of z = (v - mean) gain + offset."""
    at = image * groups + c // group_size
    m = tl.load(mean + at, mask=inside, other=0.0)
    m -= load_row(add, image * add_row, c, inside, 0.0).to(tl.float64)
    low = m.to(tl.float32)
    lower = (m - low.to(tl.float64)).to(tl.float32)
    gain, offset = affine(weight, bias, scale, shift, image, c, inside, scale_row, shift_row)
    return low, lower, gain * load_row(rstd, 0, at, inside, 0.0), offset


@triton.jit
def _differentiate(tile, grad, mask, low, lower, gain, offset, x, SILU: tl.constexpr):
    """v - mean, 0 outside the mask, and dz."""
    u = tl.where(mask, centred(tile, low, lower, x), 0.0)
    dz = grad.to(tl.float32)
    if SILU:
        z = u * gain[:, None] + offset[:, None]
        s = 1.0 / (1.0 + tl.exp(-z))
        dz *= s + s * (1.0 - s) * z
    return u, dz


@triton.jit
def _walk(
    grad, x, skip, low, lower, gain, offset, image, channels, skip_channels, pixels, start, begin,
    end, j, i, inside, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NHWC: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz (v - mean) and v - mean over the pixels from begin to end, in tiles.

    Each lane keeps its own sums, so that the loop waits for no other warp. The next tile is loaded
    while the present one is processed.
    """
    sum_dz = tl.zeros([CHANNELS, PIXELS], tl.float32)
    sum_dz_u = tl.zeros([CHANNELS, PIXELS], tl.float32)
    sum_u = tl.zeros([CHANNELS, PIXELS], tl.float32)
    mask, tile, dy = _load(
        grad, x, skip, image, channels, skip_channels, pixels, start, begin, end, j, i,
        inside, NHWC,
    )  # fmt: skip
    for first in range(begin, end, PIXELS):
        u, dz = _differentiate(tile, dy, mask, low, lower, gain, offset, x, SILU)
        mask, tile, dy = _load(
            grad, x, skip, image, channels, skip_channels, pixels, start, first + PIXELS, end, j, i,
            inside, NHWC,
        )  # fmt: skip
        sum_dz += dz
        sum_dz_u += dz * u
        sum_u += u
    return tl.sum(sum_dz, 1), tl.sum(sum_dz_u, 1), tl.sum(sum_u, 1)


@triton.jit
def _write(
    u, dz, gain, fixed, slope, dx, dskip, image, channels, skip_channels, pixels, first_channel,
    first, j, i, mask, NHWC: tl.constexpr,
):  # fmt: skip
    """Write dx of a tile. For each channel, ``fixed`` is rstd db and ``slope`` is rstd^2 ds."""
    tile = dz * gain[:, None] - fixed[:, None] - u * slope[:, None]
    store_tile(
        dx, dskip, tile, image, channels, skip_channels, pixels, first_channel, first, j, i, mask,
        NHWC,
    )  # fmt: skip


@triton.jit
def _small(
    dadd, dscale, dshift, shares, a, b, x, db, ds, r, w, factor, bias, image, c, inside, channels,
    values,
):  # fmt: skip
    """Write dadd, dscale and dshift of channels, and an image's share of dweight and dbias."""
    at = image * channels + c
    small = dadd.dtype.element_ty
    offset = load_row(bias, 0, c, inside, 0.0)
    tl.store(dadd + at, (r * (w * factor * a - values * db - x * ds)).to(small), mask=inside)
    tl.store(dscale + at, (w * b + offset * a).to(small), mask=inside)
    tl.store(dshift + at, a.to(small), mask=inside)
    at += image * channels
    tl.store(shares + at, (factor * b).to(tl.float32), mask=inside)
    tl.store(shares + at + channels, (factor * a).to(tl.float32), mask=inside)


@triton.jit
def _one_pass(
    grad, x, skip, mean, rstd, weight, bias, add, scale, shift, dx, dskip, dadd, dscale, dshift,
    shares, channels, skip_channels, pixels, groups, group_size, add_row, scale_row, shift_row,
    TILE_GROUPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    RESIDENT: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(groups, TILE_GROUPS)
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    width = TILE_GROUPS * group_size
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
        width = whole_vectors(width, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    start = program % tiles * width
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = start + j
    inside = (j < width) & (c < total)
    if RESIDENT:
        mask, tile, dy = _load(
            grad, x, skip, image, channels, skip_channels, pixels, start, 0, pixels, j, i,
            inside, NHWC,
        )  # fmt: skip
    low, lower, gain, offset = _coefficients(
        mean, rstd, weight, bias, add, scale, shift, image, c, inside, groups, group_size, add_row,
        scale_row, shift_row,
    )  # fmt: skip

    if RESIDENT:
        u, dz = _differentiate(tile, dy, mask, low, lower, gain, offset, x, SILU)
        sum_dz, sum_dz_u, sum_u = tl.sum(dz, 1), tl.sum(dz * u, 1), tl.sum(u, 1)
    else:
        sum_dz, sum_dz_u, sum_u = _walk(
            grad, x, skip, low, lower, gain, offset, image, channels, skip_channels, pixels, start,
            0, pixels, j, i, inside, CHANNELS, PIXELS, NHWC, SILU,
        )  # fmt: skip

    r = load_row(rstd, image * groups, c // group_size, inside, 0.0)
    w = load_row(weight, 0, c, inside, 1.0)
    factor = 1.0 + load_row(scale, image * scale_row, c, inside, 0.0)
    sum_dz_xhat, sum_xhat = sum_dz_u * r, sum_u * r
    member = (j // group_size)[None, :] == tl.arange(0, GROUPS)[:, None]
    values = pixels * 1.0
    db = tl.sum(tl.where(member, (w * factor * sum_dz)[None, :], 0.0), 1)
    ds = tl.sum(tl.where(member, (w * factor * sum_dz_xhat)[None, :], 0.0), 1)
    db = tl.sum(tl.where(member, (db / (values * group_size))[:, None], 0.0), 0)
    ds = tl.sum(tl.where(member, (ds / (values * group_size))[:, None], 0.0), 0)
    _small(
        dadd, dscale, dshift, shares, sum_dz, sum_dz_xhat, sum_xhat, db, ds, r, w, factor, bias,
        image, c, inside, total, values,
    )  # fmt: skip
    fixed, slope = r * db, r * r * ds

    if RESIDENT:
        _write(
            u, dz, gain, fixed, slope, dx, dskip, image, channels, skip_channels, pixels, start, 0,
            j, i, mask, NHWC,
        )  # fmt: skip
    else:
        for first in range(0, pixels, PIXELS):
            mask, tile, dy = _load(
                grad, x, skip, image, channels, skip_channels, pixels, start, first, pixels, j, i,
                inside, NHWC,
            )  # fmt: skip
            u, dz = _differentiate(tile, dy, mask, low, lower, gain, offset, x, SILU)
            _write(
                u, dz, gain, fixed, slope, dx, dskip, image, channels, skip_channels, pixels, start,
                first, j, i, mask, NHWC,
            )  # fmt: skip


@triton.jit
def _sums(
    grad, x, skip, mean, rstd, weight, bias, add, scale, shift, sums, channels, skip_channels,
    pixels, spans, steps, groups, group_size, add_row, scale_row, shift_row,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """A, B / rstd and X / rstd over spans of ``steps`` tiles: float32 [N, S, 3, C]."""
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    across = tl.cdiv(total, CHANNELS)
    program = tl.program_id(0)
    start = program % across * CHANNELS
    span = program // across % spans
    image = (program // across // spans).to(tl.int64)
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = start + j
    inside = c < total
    low, lower, gain, offset = _coefficients(
        mean, rstd, weight, bias, add, scale, shift, image, c, inside, groups, group_size, add_row,
        scale_row, shift_row,
    )  # fmt: skip
    sum_dz, sum_dz_u, sum_u = _walk(
        grad, x, skip, low, lower, gain, offset, image, channels, skip_channels, pixels, start,
        span * steps * PIXELS, (span + 1) * steps * PIXELS, j, i, inside, CHANNELS, PIXELS, NHWC,
        SILU,
    )  # fmt: skip
    at = sums + (image * spans + span) * 3 * total + c
    tl.store(at, sum_dz, mask=inside)
    tl.store(at + total, sum_dz_u, mask=inside)
    tl.store(at + 2 * total, sum_u, mask=inside)


@triton.jit
def _combine(
    sums, rstd, weight, bias, scale, group_sums, dadd, dscale, dshift, shares, channels, pixels,
    spans, groups, group_size, scale_row,
    CHANNELS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Sum one group's spans in float64; write rstd db, rstd^2 ds, and all gradients but dx."""
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    group = program % groups
    j = tl.arange(0, CHANNELS)
    c = group * group_size + j
    inside = j < group_size
    a = tl.zeros([CHANNELS], tl.float64)
    b = tl.zeros([CHANNELS], tl.float64)
    x = tl.zeros([CHANNELS], tl.float64)
    for first in range(0, spans, SPANS):
        span = first + tl.arange(0, SPANS)
        mask = inside[:, None] & (span < spans)[None, :]
        at = sums + image * spans * 3 * channels
        at = at + (span.to(tl.int64) * 3 * channels)[None, :] + c[:, None]
        a += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), 1)
        b += tl.sum(tl.load(at + channels, mask=mask, other=0.0).to(tl.float64), 1)
        x += tl.sum(tl.load(at + 2 * channels, mask=mask, other=0.0).to(tl.float64), 1)
    r = load_row(rstd, image * groups, c // group_size, inside, 0.0)
    w = load_row(weight, 0, c, inside, 1.0)
    factor = 1.0 + load_row(scale, image * scale_row, c, inside, 0.0)
    b, x = b * r, x * r
    values = pixels * 1.0
    db = tl.sum(w * factor * a) / (values * group_size)
    ds = tl.sum(w * factor * b) / (values * group_size)
    _small(
        dadd, dscale, dshift, shares, a, b, x, db, ds, r, w, factor, bias, image, c, inside,
        channels, values,
    )  # fmt: skip
    at = group_sums + image * 2 * groups + group
    r = tl.load(rstd + program)
    tl.store(at, (r * db).to(tl.float32))
    tl.store(at + groups, (r * r * ds).to(tl.float32))


@triton.jit
def _apply(
    grad, x, skip, mean, rstd, weight, bias, add, scale, shift, group_sums, dx, dskip, channels,
    skip_channels, pixels, tall, groups, group_size, add_row, scale_row, shift_row,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    if NHWC:
        channels = whole_vectors(channels, VECTOR)
        skip_channels = whole_vectors(skip_channels, VECTOR)
    else:
        pixels = whole_vectors(pixels, VECTOR)
    total = channels + skip_channels
    across = tl.cdiv(total, CHANNELS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start = program % across * CHANNELS
    first = program // across % tall * PIXELS
    image = (program // across // tall).to(tl.int64)
    j = tl.arange(0, CHANNELS)
    i = tl.arange(0, PIXELS)
    c = start + j
    inside = c < total
    mask, tile, dy = _load(
        grad, x, skip, image, channels, skip_channels, pixels, start, first, pixels, j, i,
        inside, NHWC,
    )  # fmt: skip
    low, lower, gain, offset = _coefficients(
        mean, rstd, weight, bias, add, scale, shift, image, c, inside, groups, group_size, add_row,
        scale_row, shift_row,
    )  # fmt: skip
    u, dz = _differentiate(tile, dy, mask, low, lower, gain, offset, x, SILU)
    at = image * 2 * groups
    fixed = load_row(group_sums, at, c // group_size, inside, 0.0)
    slope = load_row(group_sums, at + groups, c // group_size, inside, 0.0)
    _write(
        u, dz, gain, fixed, slope, dx, dskip, image, channels, skip_channels, pixels, start, first,
        j, i, mask, NHWC,
    )  # fmt: skip


@triton.jit
def _parameters(
    shares, dweight, dbias, images, channels, IMAGES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """dweight and dbias, the sums over the images of ``shares`` [N, 2, C]."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    dw = tl.zeros([IMAGES, CHANNELS], tl.float32)
    db = tl.zeros([IMAGES, CHANNELS], tl.float32)
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        mask = (image < images)[:, None] & (c < channels)[None, :]
        at = shares + (image.to(tl.int64) * 2 * channels)[:, None] + c[None, :]
        dw += tl.load(at, mask=mask, other=0.0)
        db += tl.load(at + channels, mask=mask, other=0.0)
    small = dweight.dtype.element_ty
    tl.store(dweight + c, tl.sum(dw, 0).to(small), mask=c < channels)
    tl.store(dbias + c, tl.sum(db, 0).to(small), mask=c < channels)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dskip ([0] without skip), dweight, dbias, dadd, dscale, dshift; see ``fastdiff.ops``."""
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    dskip = x.new_empty(0)
    if skip is not None:
        skip = skip.contiguous(memory_format=layout)
        dskip = torch.empty_like(skip, memory_format=layout)
        skip = skip if skip.shape[1] else None
    grad = grad.contiguous(memory_format=layout)
    a = activation(x, skip)
    channels = a.all_channels
    dx = torch.empty_like(x, memory_format=layout)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    dadd, dscale, dshift = (x.new_empty((a.images, channels)) for _ in range(3))
    small = (dweight, dbias, dadd, dscale, dshift)
    if grad.numel() == 0:
        for value in small:
            value.zero_()
        return dx, dskip, *small
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (add, add_row), (scale, scale_row), (shift, shift_row) = rows(add), rows(scale), rows(shift)
    rstd = rstd.contiguous()
    given = (mean.contiguous(), rstd, weight, bias, add, scale, shift)
    strides = (add_row, scale_row, shift_row)
    behind = None if skip is None else dskip
    shares = mean.new_empty((a.images, 2, channels), dtype=torch.float32)
    per_image = (dadd, dscale, dshift, shares)
    group_size = channels // num_groups
    tiles = plan(a, num_groups, 2)
    if tiles.groups:
        launch(
            _one_pass,
            (a.images * -(-num_groups // tiles.groups),),
            grad, x, skip, *given, dx, behind, *per_image,
            a.channels, a.skip_channels, a.pixels, num_groups, group_size, *strides,
            TILE_GROUPS=tiles.groups, GROUPS=power_of_two(tiles.groups), CHANNELS=tiles.channels,
            PIXELS=tiles.pixels, RESIDENT=tiles.steps == 1, NHWC=a.nhwc,
            VECTOR=a.vector(tiles.groups * group_size), SILU=silu, num_warps=tiles.warps,
        )  # fmt: skip
    else:
        across = -(-channels // tiles.channels)
        sums = shares.new_empty((a.images, tiles.spans, 3, channels))
        launch(
            _sums,
            (a.images * tiles.spans * across,),
            grad, x, skip, *given, sums, a.channels, a.skip_channels, a.pixels,
            tiles.spans, tiles.steps, num_groups, group_size, *strides,
            CHANNELS=tiles.channels, PIXELS=tiles.pixels, NHWC=a.nhwc,
            VECTOR=a.vector(tiles.channels), SILU=silu, num_warps=tiles.warps,
        )  # fmt: skip
        group_sums = shares.new_empty((a.images, 2, num_groups))
        side = power_of_two(group_size)
        launch(
            _combine,
            (a.images * num_groups,),
            sums, rstd, weight, bias, scale, group_sums, *per_image,
            channels, a.pixels, tiles.spans, num_groups, group_size, scale_row,
            CHANNELS=side, SPANS=max(min(power_of_two(tiles.spans), 1024 // side), 1), num_warps=4,
        )  # fmt: skip
        tall = -(-a.pixels // tiles.pixels)
        launch(
            _apply,
            (a.images * tall * across,),
            grad, x, skip, *given, group_sums, dx, behind, a.channels, a.skip_channels,
            a.pixels, tall, num_groups, group_size, *strides,
            CHANNELS=tiles.channels, PIXELS=tiles.pixels, NHWC=a.nhwc,
            VECTOR=a.vector(tiles.channels), SILU=silu, num_warps=tiles.warps,
        )  # fmt: skip
    launch(
        _parameters,
        (-(-channels // 32),),
        shares, dweight, dbias, a.images, channels,
        IMAGES=min(power_of_two(a.images), 32), CHANNELS=32, num_warps=1,
    )  # fmt: skip
    return dx, dskip, *small
