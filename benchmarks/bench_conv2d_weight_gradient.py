"""conv2d_weight_gradient by each algorithm that has one, against PyTorch's gradients of the weight
and the bias of a channels_last convolution: 3x3 and 1x1 layers of a U-Net that is trained.
"""

from __future__ import annotations

import pytest
import torch
from comparison import DTYPES as EVERY_DTYPE
from comparison import every_shape
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, weight_gradient_refusal
from fastdiff.ops.conv2d_spec import ConvSpec

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the result's largest value


def every_algorithm(kernel: int) -> pytest.MarkDecorator:
    """Each dtype with the algorithms that have the gradient, for a square kernel."""
    spec = ConvSpec(512, 512, (kernel, kernel), padding=(kernel // 2,) * 4)  # type: ignore[arg-type]
    return pytest.mark.parametrize(
        ("dtype", "algorithm"),
        [
            pytest.param(dtype, name, id=f"{short}-{name}")
            for short, dtype in EVERY_DTYPE.items()
            for name, row in ALGORITHMS.items()
            if weight_gradient_refusal(row, spec, dtype) is None
        ],
    )


def compare(
    versus, shape: tuple[int, ...], dtype: torch.dtype, algorithm: str, kernel: int
) -> None:
    n, channels, filters, size = shape
    pad = kernel // 2
    torch.manual_seed(0)
    x = torch.randn(n, channels, size, size).to(dtype, memory_format=torch.channels_last)
    dy = torch.randn(n, filters, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, kernel, kernel).to(
        dtype, memory_format=torch.channels_last
    )

    def ours() -> Tensor:
        return ops.conv2d_weight_gradient(
            dy, x, (kernel, kernel), padding=(pad,) * 4, algorithm=algorithm
        )[0]

    def torchs() -> Tensor:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [filters], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1,
            [False, True, True],
        )[1]  # fmt: skip

    difference = (ours() - torchs().float()).abs().max()
    assert difference <= TOLERANCE[dtype] * ours().abs().max()
    flops = 2 * kernel**2 * n * channels * filters * size**2
    versus(ours, {"torch": torchs}, notes=lambda c: {"GFLOP/s": f"{flops / c.ours / 1e9:.0f}"})


@every_algorithm(3)
@every_shape((16, 128, 128, 32), (16, 256, 256, 16), (16, 512, 256, 16), (16, 256, 256, 8))
def bench_3x3(versus, shape, dtype, algorithm) -> None:
    compare(versus, shape, dtype, algorithm, 3)


@every_algorithm(1)
@every_shape((16, 512, 256, 16), (16, 256, 256, 16))
def bench_1x1(versus, shape, dtype, algorithm) -> None:
    compare(versus, shape, dtype, algorithm, 1)
