"""w_n mean((prediction - p_n x0 - q_n z)^2) of each image n, and its gradient in the prediction.

All tensors have the same memory layout, and are walked flat. With x0 and z given, forward reads 3 S
for an activation of S bytes, backward reads 3 S and writes 1 S: the minimum. A tensor that is not
given is not read, which saves 1 S. Noise z from a seed is never in memory, which also saves 1 S and
costs the arithmetic of kernels/philox.py in each pass.

Forward is one kernel, whose programs take one or several whole images, where a program reads an
image in less time than another kernel takes to start, or where there are enough images for all SMs.
Otherwise an image is cut into pieces, and a second kernel adds up their sums of squares, 4 bytes
each. Squares are added lane by lane and the lanes in a tree, all in float32. The order of additions
depends on the shape alone.

Each program checks the timesteps that it reads. With a timestep outside the tables, no table entry
is read, and the image's loss and gradient are NaN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels import philox
from fastdiff.kernels.denoising_loss_plan import plan
from fastdiff.kernels.launch import launch
from fastdiff.kernels.q_sample import at_timestep
from fastdiff.kernels.tiles import ceil_power, dense, tile, tile_at, unit


@triton.jit
def _difference(
    prediction,
    x0,
    noise,
    seed,
    row,
    target_x0,
    target_noise,
    step,
    steps,
    image,
    images,
    first,
    offset,
    inside,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """prediction - p x0 - q z of COLUMNS elements, from `first` on, of images `image` [R, 1].

    Float32 [R, COLUMNS], 0 where not `inside`; `offset` is the elements' place in memory. Without
    x0, p counts as 0; without noise and seed, q counts as 0.
    """
    difference = tl.load(prediction + offset, inside, other=0).to(tl.float32)
    if x0 is not None:
        x = tl.load(x0 + offset, inside, other=0).to(tl.float32)
        difference -= at_timestep(target_x0, step, steps) * x
    if noise is not None:
        z = tl.load(noise + offset, inside, other=0).to(tl.float32)
        difference -= at_timestep(target_noise, step, steps) * z
    elif seed is not None:
        key_low, key_high, number = philox.stream(seed, image, image < images)
        z = philox.normal_tile(
            first, key_low, key_high, number, tl.load(row), pixels, CHANNELS, COLUMNS, CHANNELS_LAST
        )
        difference -= at_timestep(target_noise, step, steps) * z
    return tl.where(inside, difference, 0.0)


@triton.jit
def _denoising_loss(
    prediction,
    x0,
    noise,
    seed,
    row,
    t,
    target_x0,
    target_noise,
    weight,
    out,
    images,
    units,
    steps,
    pixels,
    pieces,
    loops,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Writes the losses [N] if WHOLE, else the sums of squares [N, P] of P pieces."""
    elements = units * UNIT
    group = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    if WIDE:
        group = group.to(tl.int64)
        piece = piece.to(tl.int64)
    member = group * ROWS + tl.arange(0, ROWS)
    image = member[:, None]
    step = tl.load(t + image, image < images, other=0)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(loops):
        first = (piece * loops + i) * COLUMNS
        column = (first + tl.arange(0, COLUMNS))[None, :]
        offset = image.to(tl.int64) * elements + column
        inside = (image < images) & (column < elements)
        difference = _difference(
            prediction, x0, noise, seed, row, target_x0, target_noise, step, steps, image, images,
            first, offset, inside, pixels, CHANNELS, CHANNELS_LAST, COLUMNS,
        )  # fmt: skip
        squares += difference * difference
    total = tl.sum(squares, 1)
    if WHOLE:
        step = tl.load(t + member, member < images, other=0)
        total = at_timestep(weight, step, steps) * (total / elements)
    tl.store(out + member.to(tl.int64) * pieces + piece, total, member < images)


@triton.jit
def _combine(sums, t, weight, out, elements, steps, pieces, PIECES: tl.constexpr):
    """The loss of an image from the sums of squares of its pieces."""
    image = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    total = tl.sum(tl.load(sums + image * pieces + piece, piece < pieces, other=0), 0)
    tl.store(out + image, at_timestep(weight, tl.load(t + image), steps) * (total / elements))


@triton.jit
def _denoising_loss_backward(
    grad,
    prediction,
    x0,
    noise,
    seed,
    row,
    t,
    target_x0,
    target_noise,
    weight,
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
    step = tl.load(t + image, image < images, other=0)
    difference = _difference(
        prediction, x0, noise, seed, row, target_x0, target_noise, step, steps, image, images,
        first, offset, inside, pixels, CHANNELS, CHANNELS_LAST, COLUMNS,
    )  # fmt: skip
    factor = tl.load(grad + image, image < images, other=0)
    factor *= 2 * at_timestep(weight, step, steps) / elements
    tl.store(out + offset, (factor * difference).to(out.dtype.element_ty), inside)


class _Inputs(NamedTuple):
    """Dense tensors, all images in one layout, in the order of the kernels' arguments."""

    prediction: Tensor
    x0: Tensor | None
    noise: Tensor | None
    seed: Tensor | None
    row: Tensor | None
    t: Tensor
    target_x0: Tensor
    target_noise: Tensor
    weight: Tensor

    @property
    def images(self) -> int:
        return int(self.prediction.shape[0])

    @property
    def elements(self) -> int:
        """Number of elements of an image."""
        return math.prod(int(length) for length in self.prediction.shape[1:])

    def layout(self, memory_format: torch.memory_format) -> dict[str, int]:
        """The constants CHANNELS and CHANNELS_LAST, on which noise from a seed depends."""
        last = memory_format != torch.contiguous_format and self.seed is not None
        return {"CHANNELS": self.prediction.shape[1] if last else 1, "CHANNELS_LAST": last}


def _inputs(
    prediction: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    row: Tensor | None,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> tuple[_Inputs, torch.memory_format]:
    prediction, memory_format = dense(prediction)
    inputs = _Inputs(
        prediction,
        None if x0 is None else x0.contiguous(memory_format=memory_format),
        None if noise is None else noise.contiguous(memory_format=memory_format),
        None if seed is None else seed.contiguous(),
        row,
        t.contiguous(),
        target_x0.contiguous(),
        target_noise.contiguous(),
        weight.contiguous(),
    )
    return inputs, memory_format


def _forward(*arguments: Any) -> Tensor:
    inputs, memory_format = _inputs(*arguments)
    images, elements, steps = inputs.images, inputs.elements, inputs.weight.numel()
    out = inputs.weight.new_empty(images)
    if elements == 0:
        return out.fill_(torch.nan)
    read = 1 + (inputs.x0 is not None) + (inputs.noise is not None)
    itemsize = inputs.prediction.element_size()
    chosen = plan(images, elements, itemsize, read, inputs.seed is not None)
    whole = chosen.pieces == 1
    sums = out if whole else out.new_empty(images, chosen.pieces)
    layout = inputs.layout(memory_format)
    launch(
        _denoising_loss,
        (-(-images // chosen.rows) * chosen.pieces,),
        *inputs,
        sums,
        images,
        elements // unit(elements),
        steps,
        elements // layout["CHANNELS"],
        chosen.pieces,
        chosen.loops,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        UNIT=unit(elements),
        WIDE=max(images, elements) + chosen.columns * chosen.loops >= 2**31,
        WHOLE=whole,
        num_warps=chosen.warps,
        **layout,
    )
    if not whole:
        launch(
            _combine,
            (images,),
            sums,
            inputs.t,
            inputs.weight,
            out,
            elements,
            steps,
            chosen.pieces,
            PIECES=ceil_power(chosen.pieces),
            num_warps=1,
        )
    return out


def _backward(grad: Tensor, *arguments: Any) -> Tensor:
    inputs, memory_format = _inputs(*arguments)
    images, elements = inputs.images, inputs.elements
    out = torch.empty_like(inputs.prediction, memory_format=memory_format)
    if images == 0 or elements == 0:
        return out
    itemsize = out.element_size()
    tiles = tile(images, elements, itemsize, narrowest=1 if inputs.seed is None else 4)
    if inputs.seed is not None:  # noise takes registers, so a thread has one vector of 16 bytes
        tiles = tiles._replace(warps=max(1, tiles.rows * tiles.columns * itemsize // 512))
    layout = inputs.layout(memory_format)
    launch(
        _denoising_loss_backward,
        tiles.grid,
        grad.contiguous(),
        *inputs,
        out,
        images,
        elements // tiles.unit,
        inputs.weight.numel(),
        elements // layout["CHANNELS"],
        **layout,
        **tiles.constants,
    )
    return out


def denoising_loss(
    prediction: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """``fastdiff.ops.denoising_loss``; a timestep outside the tables makes its loss NaN."""
    tables = (target_x0, target_noise, weight)
    return _forward(prediction, x0, noise, None, None, t, *tables)


def denoising_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """The gradient of ``denoising_loss`` in ``prediction``, given ``grad`` of the loss [N]."""
    tables = (target_x0, target_noise, weight)
    return _backward(grad, prediction, x0, noise, None, None, t, *tables)


def denoising_loss_from_seed(
    prediction: Tensor,
    x0: Tensor | None,
    seed: Tensor,
    row: Tensor,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """``denoising_loss`` with the noise of ``ops.philox_normal`` at ``row``, in float32."""
    tables = (target_x0, target_noise, weight)
    return _forward(prediction, x0, None, seed, row, t, *tables)


def denoising_loss_from_seed_backward(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor | None,
    seed: Tensor,
    row: Tensor,
    t: Tensor,
    target_x0: Tensor,
    target_noise: Tensor,
    weight: Tensor,
) -> Tensor:
    """The gradient of ``denoising_loss_from_seed``; the noise is computed again."""
    tables = (target_x0, target_noise, weight)
    return _backward(grad, prediction, x0, None, seed, row, t, *tables)
