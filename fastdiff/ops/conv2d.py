"""A convolution with what stands around it in a U-Net: the norm and activation that it reads
through, the additions that it writes through, and the statistics that the next norm wants.

Inference on a CPU, for ``fastdiff.compiler``. Channels-last inside, whatever comes in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import (
    check_device,
    check_floating,
    check_no_gradient,
    check_same_kind,
)
from fastdiff.ops import backend, reference
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

# The number that C++ knows them by.
ALGORITHMS = ("direct", "winograd2", "winograd4", "strassen", "phases4")
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
LARGEST = 64  # side of a kernel, stride and padding that the C++ kernel takes
MOST_CHANNELS = 2**20
GATED = 256  # filters of a gated convolution come in multiples of it
HALVES = 32  # and channels of Strassen's

torch.library.define("fastdiff::conv2d_packed_size", "(int[] weight_size, int algorithm) -> int")
torch.library.define("fastdiff::conv2d_pack", "(Tensor weight, int algorithm) -> Tensor")
torch.library.define(
    "fastdiff::conv2d",
    "(Tensor x, Tensor? skip, Tensor packed, int[] weight_size, int algorithm, Tensor? bias, "
    "int[] stride, int[] padding, bool upsample, Tensor? norm, bool silu, Tensor? emb, "
    "Tensor? residual, float scale, bool statistics, bool gated) -> (Tensor, Tensor)",
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    upsample: bool = False,
    skip: Tensor | None = None,
    norm: Tensor | None = None,
    silu: bool = False,
    emb: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    statistics: bool = False,
    gated: bool = False,
    packed: Tensor | None = None,
    algorithm: str = "direct",
) -> tuple[Tensor, Tensor | None]:
    """y = (conv(up(act(norm(cat(x, skip))))) + bias + emb + residual) * scale, in one pass.

    Neither the concatenation, the normalised tensor nor the upsampled one is written to memory.

    Args:
        x: [N, C, H, W], float32 or bfloat16 (others are computed by the reference).
        weight: [K, C + C', R, S], of x's dtype.
        bias: [K], or None.
        stride: down and across.
        padding: zeros above, below, left and right of what the convolution reads.
        upsample: the convolution reads each pixel twice in both directions (nearest, 2x).
        skip: [N, C', H, W], channels behind those of x.
        norm: float32 [N, 2, C + C'], a gain and an offset for each image and channel
            (``group_norm_coefficients``), or None for neither.
        silu: x * sigmoid(x) after them.
        emb: [N, K], added to every pixel.
        residual: like y.
        scale: multiplies the sum.
        statistics: take those of y on the way.
        gated: y = a * gelu(b), [a, b] being the halves of conv(...) + bias, whose K channels are a
            multiple of 256: GEGLU of Shazeer 2020 (arXiv:2002.05202). Direct or Strassen's, without
            emb, residual, scale and statistics.
        packed: what ``conv2d_pack(weight, algorithm)`` gave; None packs for this call alone.
        algorithm: ``direct``; for stride 1 and R = S = 3 ``winograd2`` or ``winograd4``, F(2x2) or
            F(4x4) of Lavin & Gray 2016 (arXiv:1509.09308), which take 1/2.25 and 1/4 of the
            multiplications; where such a convolution upsamples, with an even sum of paddings in
            each direction, ``phases4``: four 2x2 convolutions of the image as it is by F(4x4),
            1/5.76 of them; for R = S = 1 and channels in multiples of 32 ``strassen`` (Strassen
            1969, Numerische Mathematik 13), 7/8 of them. What they cost in accuracy is in
            csrc/cpu/kernels/conv2d_winograd.h and strassen.h.

    Returns:
        y [N, K, H', W'], or gated [N, K / 2, H', W'], channels-last, and None or its statistics:
        float64 [N, K, 2], mean and variance over each channel's pixels.

    Raises:
        RuntimeError: a gradient is wanted, which there is none of.
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit, or the algorithm does not suit the convolution.
    """
    check_no_gradient(x, weight, bias, skip, norm, emb, residual)
    args = (stride, padding, upsample, norm, silu, emb, residual, scale, statistics, gated)
    check(x, skip, weight, bias, algorithm, *args)
    with span("conv2d"):
        if not (kernel_runs(x) and within_limits(weight.shape, stride, padding)):
            return reference.conv2d(x, skip, weight, bias, *args)
        number = ALGORITHMS.index(algorithm)
        if packed is None:
            packed = conv2d_pack(weight, algorithm)
        y, found = torch.ops.fastdiff.conv2d(x, skip, packed, weight.shape, number, bias, *args)
        return y, found if statistics else None


def conv2d_pack(weight: Tensor, algorithm: str) -> Tensor:
    """``weight`` [K, C, R, S] as the kernel of ``algorithm`` reads it: a flat float32 tensor."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}, wanted one of {', '.join(ALGORITHMS)}")
    return torch.ops.fastdiff.conv2d_pack(weight, ALGORITHMS.index(algorithm))


def kernel_runs(x: Tensor) -> bool:
    """Whether the C++ kernel, and not the reference, computes on ``x``."""
    return x.dtype in KERNEL_DTYPES and x.is_cpu and backend.kernel_runs(x)


def packed_bytes(weight_size: Sequence[int], algorithm: str) -> int:
    """Memory that ``conv2d_pack`` takes for a weight [K, C, R, S]; none without the extension."""
    if backend.extension is None:
        return 0
    return 4 * torch.ops.fastdiff.conv2d_packed_size(weight_size, ALGORITHMS.index(algorithm))


def within_limits(
    weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> bool:
    """Whether the C++ kernel takes such a convolution: all but those of absurd sizes."""
    return (
        max(*weight_size[2:], *stride, *padding) <= LARGEST
        and max(weight_size[:2]) <= MOST_CHANNELS
    )


def suits(
    algorithm: str,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    upsample: bool,
) -> bool:
    """Whether ``algorithm`` can compute such a convolution."""
    _, channels, *kernel_size = weight_size
    if algorithm == "strassen":
        return kernel_size == [1, 1] and channels % HALVES == 0
    if algorithm == "phases4" and not (
        upsample and sum(padding[:2]) % 2 == 0 and sum(padding[2:]) % 2 == 0
    ):
        return False
    return algorithm == "direct" or (kernel_size == [3, 3] and tuple(stride) == (1, 1))


def output_size(
    size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], upsample: bool,
) -> list[int]:  # fmt: skip
    """Height and width of the result for images of ``size``."""
    return [
        ((2 * size[d] if upsample else size[d]) + padding[2 * d] + padding[2 * d + 1]
         - kernel_size[d]) // stride[d] + 1
        for d in (0, 1)
    ]  # fmt: skip


def check(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    algorithm: str,
    stride: Sequence[int],
    padding: Sequence[int],
    upsample: bool,
    norm: Tensor | None,
    silu: bool,
    emb: Tensor | None,
    residual: Tensor | None,
    scale: float,
    statistics: bool,
    gated: bool,
) -> None:
    """Raise what ``conv2d`` says it raises."""
    check_floating(x, "x")
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x and weight must be [N, C, H, W] and [K, C, R, S], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    n, channels, *size = x.shape
    if skip is not None:
        if skip.ndim != 4 or skip.shape != (n, skip.shape[1], *size):
            raise ValueError(
                f"skip must have the shape of x but for its channels, {tuple(x.shape)}, "
                f"got {tuple(skip.shape)}"
            )
        check_same_kind(skip, x, "skip", "x")
        channels += skip.shape[1]
    k, wanted, *kernel_size = weight.shape
    if 0 in (*weight.shape, *size):
        raise ValueError(
            f"neither weight nor image may be empty, got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if wanted != channels:
        raise ValueError(f"weight is for {wanted} channels, the input has {channels}")
    check_same_kind(weight, x, "weight", "x")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}, wanted one of {', '.join(ALGORITHMS)}")
    if len(stride) != 2 or min(stride) < 1 or len(padding) != 4 or min(padding) < 0:
        raise ValueError(
            f"wanted two strides of 1 or more and four paddings of 0 or more, "
            f"got {tuple(stride)} and {tuple(padding)}"
        )
    if not suits(algorithm, weight.shape, stride, padding, upsample):
        suited = {
            "strassen": f"1x1 kernels and channels in multiples of {HALVES}",
            "phases4": "3x3 kernels, stride 1, upsampled images and even sums of padding",
        }.get(algorithm, "3x3 kernels and stride 1")
        raise ValueError(
            f"{algorithm} is for {suited}, got a weight of {tuple(weight.shape)}, "
            f"stride {tuple(stride)}, padding {tuple(padding)} and upsample {upsample}"
        )
    if gated and (k % GATED or algorithm not in ("direct", "strassen")):
        raise ValueError(
            "a gated convolution is direct or Strassen's and has filters in multiples of "
            f"{GATED}, got {algorithm} and {k} filters"
        )
    if gated and (emb is not None or residual is not None or scale != 1 or statistics):
        raise ValueError("a gated convolution has no emb, residual, scale or statistics")
    out = output_size(size, kernel_size, stride, padding, upsample)
    if min(out) < 1:
        raise ValueError(f"images of {tuple(size)} are smaller than the kernel {kernel_size}")
    for name, value, shape in (
        ("bias", bias, (k,)),
        ("emb", emb, (n, k)),
        ("residual", residual, (n, k, *out)),
    ):
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            check_same_kind(value, x, name, "x")
    if norm is not None:
        check_device(norm, x, "norm", "x")
    if norm is not None and (norm.shape != (n, 2, channels) or norm.dtype != torch.float32):
        raise ValueError(
            f"norm must be float32 [{n}, 2, {channels}], got {norm.dtype} {tuple(norm.shape)}"
        )


@torch.library.register_fake("fastdiff::conv2d_pack")
def _fake_pack(weight: Tensor, algorithm: int) -> Tensor:
    size = torch.ops.fastdiff.conv2d_packed_size(weight.shape, algorithm)
    return weight.new_empty(size, dtype=torch.float32)


@torch.library.register_fake("fastdiff::conv2d")
def _fake(  # type: ignore[no-untyped-def]
    x, skip, packed, weight_size, algorithm, bias, stride, padding, upsample, norm, silu, emb,
    residual, scale, statistics, gated,
):  # fmt: skip
    check_devices(x, skip, packed, bias, norm, emb, residual)
    k, _, *kernel_size = weight_size
    out = output_size(x.shape[2:], kernel_size, stride, padding, upsample)
    y = x.new_empty((x.shape[0], k // 2 if gated else k, *out)).to(
        memory_format=torch.channels_last
    )
    shape = (x.shape[0], k, 2) if statistics else (0,)
    return y, x.new_empty(shape, dtype=torch.float64)
