"""The gradient of the weight of ``conv2d``, through the norm and activation that it reads through.

It is for training on a CPU. The activated, concatenated and upsampled tensor is never written to
memory: what the convolution read is all that needs to be kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.common.checks import check_floating, check_no_gradient, check_same_kind
from fastdiff.ops import conv2d_algorithms, reference
from fastdiff.ops.conv2d import kernel_runs
from fastdiff.ops.conv2d_checks import (
    algorithm_number,
    check_norm,
    check_skip,
    checked_output_size,
)
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.dispatch import check_devices
from fastdiff.ops.profiling import span

torch.library.define(
    "fastdiff::conv2d_weight_gradient",
    "(Tensor dy, Tensor x, int[] spec, int algorithm, Tensor? skip=None, Tensor? norm=None) "
    "-> (Tensor, Tensor)",
)


def conv2d_weight_gradient(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    upsample: bool = False,
    skip: Tensor | None = None,
    norm: Tensor | None = None,
    silu: bool = False,
    algorithm: str = "direct",
) -> tuple[Tensor, Tensor]:
    """The gradient of the weight of conv(up(act(norm(cat(x, skip))))), and sums of dy.

    With h the padded input that the convolution multiplies by its weight,

        dw[k, c, r, s] = sum over n, i, j of dy[n, k, i, j] h[n, c, stride_0 i + r, stride_1 j + s].

    Args:
        dy: [N, K, H', W'], the gradient of the convolution's result, of x's dtype.
        x: [N, C, H, W], float32 or bfloat16 (other dtypes are computed by the reference).
        kernel: R and S, the weight's height and width.
        stride, padding, upsample, skip, norm, silu: as in ``conv2d``.
        algorithm: ``direct`` computes every gradient.

    Returns:
        dw [K, C + C', R, S], channels-last, and the sums of dy over its pixels [N, K], of which the
        gradients of a bias and of an embedding are made. Both are float32, or float64 for float64.
        They do not depend on the number of threads.

    Raises:
        RuntimeError: autograd would record the call, which has no gradient formula.
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit, or the algorithm does not suit the convolution.
    """
    check_no_gradient(dy, x, skip, norm)
    check_floating(x, "x")
    if dy.ndim != 4 or x.ndim != 4 or len(kernel) != 2:
        raise ValueError(
            "dy, x and kernel must be [N, K, H', W'], [N, C, H, W] and two sides, got "
            f"{tuple(dy.shape)}, {tuple(x.shape)} and {tuple(kernel)}"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"images may not be empty, got {tuple(x.shape)}")
    n, k = x.shape[0], dy.shape[1]
    spec = ConvSpec(
        k, check_skip(skip, x), tuple(kernel), tuple(stride), tuple(padding),  # type: ignore[arg-type]
        upsample, silu,
    )  # fmt: skip
    wanted = (n, k, *checked_output_size(spec, x.shape[2:]))
    if dy.shape != wanted:
        raise ValueError(f"dy must have shape {wanted}, got {tuple(dy.shape)}")
    check_same_kind(dy, x, "dy", "x")
    check_norm(norm, x, spec.channels)
    computes = kernel_runs(x)
    number = algorithm_number(
        algorithm, spec, x.dtype if computes else None, conv2d_algorithms.weight_gradient_refusal
    )
    with span("conv2d_weight_gradient"):
        if number is None or not computes:
            return reference.conv2d_weight_gradient(dy, x, spec, skip, norm)
        return torch.ops.fastdiff.conv2d_weight_gradient(dy, x, spec.encode(), number, skip, norm)


@torch.library.register_fake("fastdiff::conv2d_weight_gradient")
def _fake(dy, x, numbers, algorithm, skip=None, norm=None):  # type: ignore[no-untyped-def]
    check_devices(dy, x, skip, norm)
    spec = ConvSpec.decode(numbers)
    dw = x.new_empty(spec.weight, dtype=torch.float32).to(memory_format=torch.channels_last)
    return dw, x.new_empty((x.shape[0], spec.filters), dtype=torch.float32)
