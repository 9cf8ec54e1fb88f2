"""One row of a sampler's table (fastdiff/samplers/table.py). With the model's output m and noise z:

    m  = m_u + guidance (m_c - m_u), times a factor per image if guidance is rescaled
    x0 = clamp(x0_x x + x0_m m, low, high), or clamp(.., -s, s) / s with a limit s per image
    x' = out_x x + out_x0 x0 + out_m m + sum h_j history_j + noise exp((logvar + logvar_v v) / 2) z
    history[slot] = keep_x x + keep_x0 x0 + keep_m m + keep_noise z

Layout: x [N, C, pixels] or [N, pixels, C]. All images are walked flat together, unless noise comes
from a seed or the model's output has variance channels: then images are walked one by one. Variance
channels v follow m in each image, or channels-last in each pixel. The kernel reads x, m (m_u and
m_c), and, where the row has a coefficient for them, v, z and slots of the history, each once. It
writes x' and the slot. That is 3 L for latents of L bytes without guidance, history and noise, 4 L
with guidance, and one float32 per element for each slot read or written: the minimum. Noise from a
seed is never in memory.

There is one launch for any row: a program reads the row by the step's number in device memory and
branches on its coefficients, so a captured graph serves all rows. Slots, noise and variance are
loaded under a mask that depends on the coefficient: a masked load moves nothing, and the other
loads are in flight together, which branches would prevent. The loads of x and m do not depend on
the row, and begin before it has arrived.

Rescaled guidance and dynamic thresholding need a factor and a limit of the whole image
(sampler_step_image.py) before its first element can be written. They are computed from x, which the
result may overwrite. So in such a row a program computes whole images, first the factor and the
limit, and programs without an image stop. That takes one launch and no workspace, computes nothing
twice and cannot race when `out` is x. The price is that only one multiprocessor works on an image.
Such a row reads m_u and m_c once more for the factor, and x and m five times more for the limit,
mostly from the caches. For other rows it costs a branch, and the registers of the longest path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdiff.kernels.launch import launch
from fastdiff.kernels.philox import normal_at, normal_run, stream
from fastdiff.kernels.sampler_step_image import (
    begin,
    free_x0,
    guided,
    inside,
    places,
    rescale_factor,
    threshold,
)

# The columns of a row, as in COLUMNS of fastdiff/ops/sampler_step.py (a test compares the two). The
# coefficients of the history's slots follow.
COLUMNS = tl.constexpr(18)
GUIDANCE = tl.constexpr(0)
RESCALE = tl.constexpr(1)
X0_X = tl.constexpr(2)
X0_M = tl.constexpr(3)
CLIP_MIN = tl.constexpr(4)
CLIP_MAX = tl.constexpr(5)
QUANTILE = tl.constexpr(6)
OUT_X = tl.constexpr(7)
OUT_X0 = tl.constexpr(8)
OUT_M = tl.constexpr(9)
NOISE = tl.constexpr(10)
LOGVAR = tl.constexpr(11)
LOGVAR_V = tl.constexpr(12)
KEEP_X = tl.constexpr(13)
KEEP_X0 = tl.constexpr(14)
KEEP_M = tl.constexpr(15)
KEEP_NOISE = tl.constexpr(16)
SLOT = tl.constexpr(17)


@triton.jit
def _where(mask, wanted):
    """The mask if the scalar condition `wanted` holds, else all False.

    The condition is converted to an integer, because Triton's interpreter turns a comparison of
    scalars into a block, and the compiler sees that an integer is the same in all lanes, so that it
    keeps whole vectors.
    """
    return mask & (tl.broadcast_to(tl.where(wanted, 1, 0), mask.shape) != 0)


@triton.jit
def _draw(
    seed, image, index, first, lane, channels, pixels, NHWC: tl.constexpr, TILE: tl.constexpr
):
    """Noise of the elements first + lane of an image, whose streams count channels-first."""
    low, high, number = stream(seed, image)
    if NHWC:
        pixel = first // channels
        place = (first - pixel * channels).to(tl.int32) + lane
        pixel += place // channels
        z = normal_at((place % channels).to(tl.int64) * pixels + pixel, low, high, number, index)
    else:
        z = normal_run(first // 4 + tl.arange(0, TILE // 4), low, high, number, index)
    return z


@triton.jit
def _keep(slot, kept, first, end, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Write float32 values to the elements of a slot from first up to end (excluded).

    Where a thread holds 8 consecutive elements, as with 16-bit images, they are written as two
    halves. Otherwise the compiler would hold 4, and compute everything again in that order.
    """
    if VECTOR == 8:
        halves = tl.permute(tl.reshape(kept, [TILE // 8, 2, 4]), [0, 2, 1])
        low, high = tl.split(halves)
        lane = 8 * tl.arange(0, TILE // 8)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(slot + lane, low, mask=inside(first, end, lane, TILE))
        tl.store(slot + lane + 4, high, mask=inside(first, end, lane + 4, TILE))
    else:
        lane = tl.arange(0, TILE)
        tl.store(slot + lane, kept, mask=inside(first, end, lane, TILE))


@triton.jit
def _load(
    x, model_out, conditional, image, first, end, lane, length, channels,
    GUIDED: tl.constexpr, VARIANCE: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Elements first + lane < end of an image: x, m_u and m_c (m_u again without guidance)."""
    mask = inside(first, end, lane, TILE)
    place = places(first, lane, channels, INTERLEAVED)
    start = begin(first, channels, INTERLEAVED)
    if VARIANCE:
        start += 2 * image * length
    else:
        start += image * length
    x_t = tl.load(x + (image * length + first) + lane, mask=mask, other=0.0)
    m_u = tl.load(model_out + start + place, mask=mask, other=0.0)
    m_c = m_u
    if GUIDED:
        m_c = tl.load(conditional + start + place, mask=mask, other=0.0)
    return x_t, m_u, m_c


@triton.jit
def _finish(
    x, m, low, high, scale, image, first, end, lane, variance,
    history, noise, seed, out, row, known, index, length, channels, pixels, slot_stride,
    VARIANCE: tl.constexpr, NHWC: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Everything after m, for the elements first + lane < end: x' and the history's slot.

    x and m are float32 values. `variance` points to v of the first image.
    """
    mask = inside(first, end, lane, TILE)
    start = image * length + first
    if noise is not None or seed is not None:
        amount = tl.load(row + NOISE, mask=known, other=0.0)
        keep_noise = tl.load(row + KEEP_NOISE, mask=known, other=0.0)
        noisy = (amount != 0) | (keep_noise != 0)
        if noise is not None:
            z = tl.load(noise + start + lane, mask=_where(mask, noisy), other=0.0).to(tl.float32)
        else:
            z = tl.zeros([TILE], tl.float32)
            if noisy:
                z = _draw(seed, image, index, first, lane, channels, pixels, NHWC, TILE)
    x0_x = tl.load(row + X0_X, mask=known, other=0.0)
    x0 = free_x0(x, m, x0_x, tl.load(row + X0_M, mask=known, other=0.0)) * scale
    x0 = tl.maximum(x0, low, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, high, propagate_nan=tl.PropagateNan.ALL)
    # A step outside the table has the coefficient NaN here, and 0 for everything else.
    y = tl.load(row + OUT_X, mask=known, other=float("nan")) * x
    y += tl.load(row + OUT_X0, mask=known, other=0.0) * x0
    y += tl.load(row + OUT_M, mask=known, other=0.0) * m
    for j in tl.static_range(DEPTH):
        factor = tl.load(row + COLUMNS + j, mask=known, other=0.0)
        wanted = _where(mask, factor != 0)
        slot = history + (j * slot_stride + start)
        y += factor * tl.load(slot + lane, mask=wanted, other=0.0)
    if noise is not None or seed is not None:
        logvar = tl.load(row + LOGVAR, mask=known, other=0.0)
        if VARIANCE:
            logvar_v = tl.load(row + LOGVAR_V, mask=known, other=0.0)
            wanted = _where(mask, (amount != 0) & (logvar_v != 0))
            v_at = variance + (2 * image * length + begin(first, channels, NHWC))
            place = places(first, lane, channels, NHWC)
            v = tl.load(v_at + place, mask=wanted, other=0.0).to(tl.float32)
            deviation = tl.exp(0.5 * (logvar + logvar_v * v))
        else:
            deviation = tl.exp(0.5 * logvar)
        y += tl.where(amount != 0, amount * deviation * z, 0.0)
    if DEPTH > 0:
        kept = tl.load(row + KEEP_X, mask=known, other=0.0) * x
        kept += tl.load(row + KEEP_X0, mask=known, other=0.0) * x0
        kept += tl.load(row + KEEP_M, mask=known, other=0.0) * m
        if noise is not None or seed is not None:
            kept += tl.where(keep_noise != 0, keep_noise * z, 0.0)
        number = tl.load(row + SLOT, mask=known, other=-1.0)
        keeps = (number >= 0) & (number < DEPTH)
        kept_at = history + (tl.where(keeps, number, 0.0).to(tl.int64) * slot_stride + start)
    # All threads have read their elements before any thread writes.
    tl.debug_barrier()
    if DEPTH > 0:
        _keep(kept_at, kept, first, tl.where(keeps, end, 0), VECTOR, TILE)
    tl.store(out + start + lane, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sampler_step(
    x, model_out, history, noise, table, step, seed, out,
    rows, images, length, channels, pixels, tiles, slot_stride,
    GUIDED: tl.constexpr, VARIANCE: tl.constexpr, NHWC: tl.constexpr, DEPTH: tl.constexpr,
    VECTOR: tl.constexpr, TILE: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """A program computes a tile, or whole images. `tiles` is the tiles that are walked together."""
    INTERLEAVED: tl.constexpr = VARIANCE and NHWC
    program = tl.program_id(0)
    length = tl.cast(length, tl.int64)
    wide = length  # elements of an image of the model's output
    if VARIANCE:
        wide = 2 * length
    conditional = model_out
    if GUIDED:
        conditional = model_out + images * wide
    index = tl.load(step)

    lane = tl.arange(0, TILE)
    if VARIANCE or seed is not None:
        image = (program // tiles).to(tl.int64)
        first = (program % tiles).to(tl.int64) * TILE
        end = length
    else:
        image = tl.cast(0, tl.int64)
        first = program.to(tl.int64) * TILE
        end = images * length
    x_t, m_u, m_c = _load(
        x, model_out, conditional, image, first, end, lane, length, channels,
        GUIDED, VARIANCE, INTERLEAVED, TILE,
    )  # fmt: skip

    known = (index >= 0) & (index < rows)
    row = table + tl.where(known, index, 0) * (COLUMNS + DEPTH)
    guidance = tl.load(row + GUIDANCE, mask=known, other=0.0)
    rescale = tl.load(row + RESCALE, mask=known & GUIDED, other=0.0)
    quantile = tl.load(row + QUANTILE, mask=known, other=0.0)
    low = tl.load(row + CLIP_MIN, mask=known, other=0.0)
    high = tl.load(row + CLIP_MAX, mask=known, other=0.0)
    by_itself = (quantile > 0) | (rescale != 0)
    factor = tl.cast(1, tl.float32)
    scale = tl.cast(1, tl.float32)
    number_from, stop, by, count = 0, 1, 1, tl.cast(1, tl.int64)
    if by_itself:
        number_from, stop, by, count = program, images, tl.num_programs(0), tl.cdiv(length, TILE)
    for number in range(number_from, stop, by):
        if by_itself:
            image = tl.cast(number, tl.int64)
            first = tl.cast(0, tl.int64)
            end = length
            own_m, own_conditional = model_out + image * wide, conditional + image * wide
            if GUIDED:  # noqa: SIM102 - a constexpr, so the compiler can drop what follows
                if rescale != 0:
                    factor = rescale_factor(
                        own_m, own_conditional, length, channels, guidance, rescale,
                        INTERLEAVED, SWEEP,
                    )  # fmt: skip
            if quantile > 0:
                limit = threshold(
                    x + image * length, own_m, own_conditional, length, channels,
                    guidance, factor, tl.load(row + X0_X), tl.load(row + X0_M), quantile,
                    tl.load(row + CLIP_MAX), GUIDED, INTERLEAVED, SWEEP,
                )  # fmt: skip
                scale, low, high = 1 / limit, tl.cast(-1, tl.float32), tl.cast(1, tl.float32)
            x_t, m_u, m_c = _load(
                x, model_out, conditional, image, first, end, lane, length, channels,
                GUIDED, VARIANCE, INTERLEAVED, TILE,
            )  # fmt: skip
        for tile in range(count):
            m = m_u.to(tl.float32)
            if GUIDED:
                m = guided(m, m_c.to(tl.float32), tl.zeros_like(m) + guidance) * factor
            _finish(
                x_t.to(tl.float32), m, low, high, scale, image, first, end, lane,
                conditional + (channels if NHWC else length), history, noise, seed, out, row,
                known, index, length, channels, pixels, slot_stride, VARIANCE, NHWC, DEPTH,
                VECTOR, TILE,
            )  # fmt: skip
            first += TILE
            if tile + 1 < count:
                x_t, m_u, m_c = _load(
                    x, model_out, conditional, image, first, end, lane, length, channels,
                    GUIDED, VARIANCE, INTERLEAVED, TILE,
                )  # fmt: skip


def plan(walked: int, total: int, vector: int, by_image: bool) -> tuple[int, int, int]:
    """Elements of a program, elements of a step of a sweep over an image, and warps.

    ``walked`` of ``total`` elements are walked together. A thread has one vector of each tensor, or
    8 elements where there are enough programs and few registers in use. A float32 latent of
    4 x 64 x 64 is spread over 16 programs, a 16-bit one over 8.
    """
    warps = 8
    while warps > 1 and warps * 16 * vector >= walked:
        warps //= 2
    each = 8 if total > 1 << 20 and not by_image else vector
    return warps * 32 * each, warps * 32 * vector, warps


def registers(whole: bool, vector: int, by_image: bool, more: bool, depth: int) -> int:
    """The limit of registers per thread.

    Without a limit the assembler chooses one and spills registers to reach it. With 80, three
    programs share a multiprocessor, with 128 two.

    Args:
        whole: whether images are whole vectors. Otherwise they are loaded by elements, which takes
            more registers.
        vector: elements of a vector.
        by_image: whether images are walked one by one.
        more: whether there is guidance or a noise tensor.
        depth: slots of the history.
    """
    if by_image or not whole or depth > (3 if vector == 4 else 0):
        return 255
    return 128 if depth or more else 80


def _overlap(a: Tensor, b: Tensor | None) -> bool:
    """Whether the ranges of memory of two tensors overlap, by their metadata."""
    if b is None or not torch._C._is_alias_of(a, b):
        return False
    (a_first, a_last), (b_first, b_last) = _stretch(a), _stretch(b)
    return a_first < b_last and b_first < a_last


def _stretch(t: Tensor) -> tuple[int, int]:
    last = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    first = t.storage_offset() * t.itemsize
    return first, first + last * t.itemsize


def _overlaps_itself(t: Tensor) -> bool:
    return any(size > 1 and not stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _slots(history: Tensor, x: Tensor) -> Tensor:
    """The history if its slots have the strides of the dense tensor x, else a copy that has."""
    places = zip(x.shape, history.stride()[1:], x.stride(), strict=True)
    if all(size == 1 or mine == wanted for size, mine, wanted in places):
        return history
    strides = (x.numel(), *x.stride())
    slots = torch.empty_strided(history.shape, strides, dtype=history.dtype, device=history.device)
    return slots.copy_(history)


def sampler_step(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    seed: Tensor | None,
    out: Tensor,
) -> None:
    """``fastdiff.ops.sampler_step``. A step outside the table gives NaN and writes no slot.

    Raises:
        ValueError: the history overlaps another tensor or itself, or out overlaps itself.
    """
    if x.numel() == 0:
        return
    if history is not None:
        if any(_overlap(history, other) for other in (x, model_out, out, table, noise)):
            raise ValueError("history must not overlap another tensor")
        if _overlaps_itself(history):
            raise ValueError("history must not overlap itself")
    if _overlaps_itself(out):
        raise ValueError("out must not overlap itself")
    images, channels = x.shape[:2]
    length = x.numel() // images
    guided_output, variance = model_out.shape[0] != images, model_out.shape[1] != channels
    form = suggest_memory_format(x)
    nhwc = form != torch.contiguous_format
    x_t, m = x.contiguous(memory_format=form), model_out.contiguous(memory_format=form)
    z = None if noise is None else noise.contiguous(memory_format=form)
    depth = 0 if history is None else history.shape[0]
    slots = None if history is None or depth == 0 else _slots(history, x_t)

    # An element may be written where the same element was read, and nowhere else.
    def spoils(read: Tensor | None) -> bool:
        return _overlap(out, read) and out.storage_offset() != read.storage_offset()

    direct = out.is_contiguous(memory_format=form) and not (
        spoils(x_t) or spoils(m) or spoils(z) or (variance and _overlap(out, m))
    )
    result = out if direct else torch.empty_like(x_t)
    by_image = variance or seed is not None
    walked = length if by_image else x.numel()
    # `whole`: images are whole vectors, and Triton knows it. Threads hold fewer elements where they
    # are not, and where those of a deep history and a scattered variance exceed the registers.
    whole = length % 16 == 0
    spread = not whole or (variance and nhwc and depth > 3)
    vector = 4 if spread else 16 // x.element_size()
    tile, sweep, warps = plan(walked, x.numel(), vector, by_image)
    tiles = triton.cdiv(walked, tile)
    more = guided_output or noise is not None
    launch(
        _sampler_step,
        (tiles * images if by_image else tiles,),
        x_t, m, slots, z, table.contiguous(), step,
        None if seed is None else seed.contiguous(), result,
        table.shape[0], images, length, channels, length // channels, tiles,
        0 if slots is None else slots.stride(0),
        GUIDED=guided_output, VARIANCE=variance, NHWC=nhwc, DEPTH=depth,
        VECTOR=vector, TILE=tile, SWEEP=sweep, num_warps=warps,
        maxnreg=registers(whole, vector, by_image, more, depth),
    )  # fmt: skip
    if not direct:
        out.copy_(result)
    if slots is not None and slots is not history:
        history.copy_(slots)
