"""A convolution fused with its neighbours in a U-Net: the norm and activation of its input, the
additions to its output, and the statistics of the output for the next norm.

It is for inference on a CPU, and is used by ``fastdiff.compiler``. It computes in channels-last
format, whatever the format of its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import (
    check_floating,
    check_no_gradient,
    check_same_kind,
)
from fastdiff.ops import backend, conv2d_algorithms, reference
from fastdiff.ops.conv2d_algorithms import packed_count
from fastdiff.ops.conv2d_checks import (
    algorithm_number,
    check_norm,
    check_skip,
    checked_output_size,
)
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# An algorithm is given by its number in the list of csrc/cpu/conv2d_algorithms.cpp: a profiler
# records numbers among an operator's arguments, but no strings.
torch.library.define(
    "fastdiff::conv2d_pack", "(Tensor weight, int algorithm, bool turned=False) -> Tensor"
)
torch.library.define(
    "fastdiff::conv2d",
    "(Tensor x, Tensor packed, int[] spec, int algorithm, Tensor? skip=None, Tensor? bias=None, "
    "Tensor? norm=None, Tensor? emb=None, Tensor? residual=None, float scale=1.0) "
    "-> (Tensor, Tensor)",
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

    The concatenation, the normalised tensor and the upsampled tensor are never written to memory.

    Args:
        x: [N, C, H, W], float32 or bfloat16 (other dtypes are computed by the reference).
        weight: [K, C + C', R, S], of x's dtype.
        bias: [K], or None.
        stride: vertical and horizontal.
        padding: rows and columns of zeros above, below, left and right of the convolution's input.
        upsample: the convolution's input is upsampled 2x (nearest neighbour).
        skip: [N, C', H, W], channels to concatenate after those of x.
        norm: float32 [N, 2, C + C'], a gain and an offset for each image and channel
            (``group_norm_coefficients``), or None for no norm.
        silu: apply x * sigmoid(x) after the norm.
        emb: [N, K], added to every pixel.
        residual: added to the result, of its shape.
        scale: factor of the sum.
        statistics: also return the statistics of y.
        gated: y = a * gelu(b), [a, b] being the halves of conv(...) + bias: GEGLU of Shazeer 2020
            (arXiv:2002.05202). Only by ``direct`` or ``strassen``, with K a multiple of 256,
            without emb, residual, scale and statistics.
        packed: the result of ``conv2d_pack(weight, algorithm)``; None packs for this call alone.
        algorithm: ``direct`` computes every convolution. For stride 1 and R = S = 3 ``winograd2``
            and ``winograd4``, F(2x2) and F(4x4) of Lavin & Gray 2016 (arXiv:1509.09308), take
            1/2.25 and 1/4 of its multiplications. If such a convolution also upsamples, with an
            even sum of paddings in each direction, ``phases4``, four 2x2 convolutions of the
            smaller image by F(4x4), takes 1/5.76. For R = S = 1 and channels in multiples of 32
            ``strassen`` (Strassen 1969, Numerische Mathematik 13) takes 7/8. ``winograd2_bf16`` is
            F(2x2) with products of bfloat16, for bfloat16 images, ``silu`` and processors with
            AVX512-BF16 and no tiles. Accuracies are stated in csrc/cpu/kernels/conv2d_winograd.h,
            strassen.h and bf16/conv2d_winograd.cpp. Without the C++ extension the name is ignored.

    Returns:
        y [N, K, H', W'], or gated [N, K / 2, H', W'], channels-last; and its statistics or None:
        float64 [N, K, 2], mean and variance over each channel's pixels.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit, or the algorithm does not suit the convolution.
    """
    check_no_gradient(x, weight, bias, skip, norm, emb, residual)
    _check_input(x, weight, skip)
    k, c, *kernel = weight.shape
    spec = ConvSpec(
        k, c, (kernel[0], kernel[1]), tuple(stride), tuple(padding),  # type: ignore[arg-type]
        upsample, silu, gated, statistics,
    )  # fmt: skip
    computes = kernel_runs(x)
    number = algorithm_number(
        algorithm, spec, x.dtype if computes else None, conv2d_algorithms.refusal
    )
    _check_output(x, spec, bias, norm, emb, residual, scale)
    with span("conv2d"):
        if number is None or not computes:
            return reference.conv2d(
                x, weight, spec, skip=skip, bias=bias, norm=norm, emb=emb, residual=residual,
                scale=scale,
            )  # fmt: skip
        if packed is None:
            packed = torch.ops.fastdiff.conv2d_pack(weight, number)
        y, of_y = torch.ops.fastdiff.conv2d(
            x, packed, spec.encode(), number, skip, bias, norm, emb, residual, scale
        )
        return y, of_y if statistics else None


def conv2d_pack(weight: Tensor, algorithm: str, *, turned: bool = False) -> Tensor:
    """A weight in the layout that an algorithm of the C++ kernel reads.

    Args:
        weight: [K, C, R, S], float32, bfloat16 or float16, on the CPU. It is rounded once, to the
            dtype in which the algorithm keeps it, which may be another one than that of the images.
        algorithm: a name as in ``conv2d``.
        turned: pack ``weight.flip(2, 3).transpose(0, 1)`` instead, without making it. By it and
            paddings of R - 1 and S - 1 less those of a convolution by ``weight`` of stride 1,
            a convolution computes the gradient of that one's input.

    Returns:
        A flat tensor, to be passed to ``conv2d`` as ``packed`` with the same algorithm.

    Raises:
        RuntimeError: there is no C++ extension.
        TypeError: another dtype.
        ValueError: an unknown algorithm, or an algorithm that is not for such a weight.
    """
    number = conv2d_algorithms.named(algorithm).number
    return torch.ops.fastdiff.conv2d_pack(weight, number, turned)


def kernel_runs(x: Tensor) -> bool:
    """Whether the C++ kernel, and not the reference, computes on ``x``."""
    return x.dtype in KERNEL_DTYPES and x.is_cpu and backend.kernel_runs(x)


def _check_input(x: Tensor, weight: Tensor, skip: Tensor | None) -> None:
    """Raise the errors of ``conv2d`` for an input, x and skip, that does not fit the weight."""
    check_floating(x, "x")
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x and weight must be [N, C, H, W] and [K, C, R, S], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    channels = check_skip(skip, x)
    if 0 in (*weight.shape, *x.shape[2:]):
        raise ValueError(
            f"neither weight nor image may be empty, got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if weight.shape[1] != channels:
        raise ValueError(f"weight is for {weight.shape[1]} channels, the input has {channels}")
    check_same_kind(weight, x, "weight", "x")


def _check_output(
    x: Tensor,
    spec: ConvSpec,
    bias: Tensor | None,
    norm: Tensor | None,
    emb: Tensor | None,
    residual: Tensor | None,
    scale: float,
) -> None:
    """Raise the errors of ``conv2d`` for a norm or an addition that does not fit the sizes."""
    added = emb is not None or residual is not None or scale != 1 or spec.statistics
    if spec.gated and added:
        raise ValueError("a gated convolution has no emb, residual, scale or statistics")
    if spec.gated and spec.filters % 2:
        raise ValueError(f"a gated convolution has two halves, got {spec.filters} filters")
    n, size = x.shape[0], x.shape[2:]
    out = checked_output_size(spec, size)
    for name, value, shape in (
        ("bias", bias, (spec.filters,)),
        ("emb", emb, (n, spec.filters)),
        ("residual", residual, (n, spec.filters, *out)),
    ):
        if value is not None:
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            check_same_kind(value, x, name, "x")
    check_norm(norm, x, spec.channels)


@torch.library.register_fake("fastdiff::conv2d_pack")
def _fake_pack(weight: Tensor, algorithm: int, turned: bool = False) -> Tensor:
    row = conv2d_algorithms.numbered(algorithm)
    k, c, *kernel = weight.shape
    shape = (c, k, *kernel) if turned else (k, c, *kernel)
    return weight.new_empty(packed_count(row, shape), dtype=row.packed_dtype)


@torch.library.register_fake("fastdiff::conv2d")
def _fake(  # type: ignore[no-untyped-def]
    x, packed, numbers, algorithm, skip=None, bias=None, norm=None, emb=None, residual=None,
    scale=1.0,
):  # fmt: skip
    check_devices(x, skip, packed, bias, norm, emb, residual)
    spec = ConvSpec.decode(numbers)
    n, k = x.shape[0], spec.filters
    size = (n, k // 2 if spec.gated else k, *spec.output_size(x.shape[2:]))
    y = x.new_empty(size).to(memory_format=torch.channels_last)
    return y, x.new_empty((n, k, 2) if spec.statistics else (0,), dtype=torch.float64)
