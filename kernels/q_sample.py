"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, one timestep per image.

All tensors have the same memory layout, and are walked flat. ``q_sample`` takes the noise as a
tensor: it reads 2 S and writes 1 S for an activation of S bytes. ``q_sample_from_seed`` computes
the noise from a seed: it reads 1 S and writes 1 S, since the noise is never in memory, and a kernel
that needs it later computes it again. Both are the minimum. The products, the sum and noise from a
seed are in float32, and x_t is rounded once.

Each program checks the timesteps that it reads. With a timestep outside the tables, no table entry
is read, and the image is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import philox
from fastdiff.kernels.launch import launch
from fastdiff.kernels.tiles import dense, tile, tile_at


@triton.jit
def at_timestep(table, step, steps):
    """Entries `step` of a table [steps]; NaN, and nothing is read, for timesteps outside it."""
    return tl.load(table + step, (step >= 0) & (step < steps), other=float("nan"))


@triton.jit
def _noised(x, z, t, signal, sigma, steps, image, images):
    """x_t, float32 [R, COLUMNS], from `x` and `z` [R, COLUMNS] of images `image` [R, 1]."""
    step = tl.load(t + image, image < images, other=0)
    return at_timestep(signal, step, steps) * x + at_timestep(sigma, step, steps) * z


@triton.jit
def _q_sample(
    x0,
    t,
    noise,
    signal,
    sigma,
    out,
    images,
    units,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    elements = units * UNIT
    image, first = tile_at(elements, ROWS, COLUMNS, WIDE)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    offset = image.to(tl.int64) * elements + column
    inside = (image < images) & (column < elements)
    x = tl.load(x0 + offset, inside, other=0).to(tl.float32)
    z = tl.load(noise + offset, inside, other=0).to(tl.float32)
    x_t = _noised(x, z, t, signal, sigma, steps, image, images)
    tl.store(out + offset, x_t.to(out.dtype.element_ty), inside)


@triton.jit
def _q_sample_from_seed(
    x0,
    t,
    seed,
    row,
    signal,
    sigma,
    out,
    images,
    units,
    steps,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    elements = units * UNIT
    image, first = tile_at(elements, ROWS, COLUMNS, WIDE)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    offset = image.to(tl.int64) * elements + column
    inside = (image < images) & (column < elements)
    x = tl.load(x0 + offset, inside, other=0).to(tl.float32)
    key_low, key_high, number = philox.stream(seed, image, image < images)
    z = philox.normal_tile(
        first, key_low, key_high, number, tl.load(row), pixels, CHANNELS, COLUMNS, CHANNELS_LAST
    )
    x_t = _noised(x, z, t, signal, sigma, steps, image, images)
    tl.store(out + offset, x_t.to(out.dtype.element_ty), inside)


def q_sample(
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """``fastdiff.ops.q_sample``; a timestep outside the tables makes its image NaN."""
    x0, memory_format = dense(x0)
    out = torch.empty_like(x0, memory_format=memory_format)
    if out.numel() == 0:
        return out
    images = x0.shape[0]
    elements = x0.numel() // images
    tiles = tile(images, elements, x0.element_size())
    launch(
        _q_sample,
        tiles.grid,
        x0,
        t.contiguous(),
        noise.contiguous(memory_format=memory_format),
        sqrt_alphas_cumprod.contiguous(),
        sqrt_one_minus_alphas_cumprod.contiguous(),
        out,
        images,
        elements // tiles.unit,
        sqrt_alphas_cumprod.numel(),
        **tiles.constants,
    )
    return out


def q_sample_from_seed(
    x0: Tensor,
    t: Tensor,
    seed: Tensor,
    row: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
) -> Tensor:
    """``q_sample`` with the noise of ``fastdiff.ops.philox_normal`` at ``row``, in float32."""
    x0, memory_format = dense(x0)
    out = torch.empty_like(x0, memory_format=memory_format)
    if out.numel() == 0:
        return out
    images = x0.shape[0]
    elements = x0.numel() // images
    channels_last = memory_format != torch.contiguous_format
    channels = x0.shape[1] if channels_last else 1
    tiles = tile(images, elements, x0.element_size(), narrowest=4)
    launch(
        _q_sample_from_seed,
        tiles.grid,
        x0,
        t.contiguous(),
        seed.contiguous(),
        row,
        sqrt_alphas_cumprod.contiguous(),
        sqrt_one_minus_alphas_cumprod.contiguous(),
        out,
        images,
        elements // tiles.unit,
        sqrt_alphas_cumprod.numel(),
        elements // channels,
        CHANNELS=channels,
        CHANNELS_LAST=channels_last,
        **tiles.constants,
    )
    return out
