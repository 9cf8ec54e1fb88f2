"""upsample_nearest2x and its gradient on the GPU kernels."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

from fastdiff import ops

SHAPES = {
    "whole vectors": (2, 32, 4, 16),
    "short rows": (1, 24, 4, 8),
    "odd": (2, 5, 3, 7),
    "one pixel": (2, 13, 1, 1),
    "one row": (1, 3, 1, 5),
    "one column": (1, 3, 5, 1),
    "latent": (1, 4, 12, 20),
    "one channel": (2, 1, 6, 6),
}
CASES = [
    pytest.param(shape, layout, dtype, id=f"{name} {layout_id} {dtype_id}")
    for name, shape in SHAPES.items()
    for layout, layout_id in zip(LAYOUTS, LAYOUT_IDS, strict=True)
    for dtype, dtype_id in zip(DTYPES, DTYPE_IDS, strict=True)
]


def make(gpu, shape, dtype, layout):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(gpu.device, dtype)
    return x.contiguous(memory_format=layout)


def spread(x):
    """Each pixel four times, by copying."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES)
def test_every_value_is_copied_four_times(gpu, shape, layout, dtype) -> None:
    x = make(gpu, shape, dtype, layout)
    y = ops.upsample_nearest2x(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout) or shape[1] == 1 or shape[2:] == (1, 1)
    assert torch.equal(y, spread(x))


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES)
def test_the_gradient_is_the_sum_of_four(gpu, shape, layout, dtype) -> None:
    x = make(gpu, shape, dtype, layout).requires_grad_()
    n, c, h, w = shape
    factor = make(gpu, (n, c, 2 * h, 2 * w), dtype, layout)

    def gradient(x, factor):
        return torch.autograd.grad((ops.upsample_nearest2x(x) * factor).sum(), x)

    assert_close_to_oracle(gradient, x, factor)
    (found,) = gradient(x, factor)
    assert found.is_contiguous(memory_format=layout) or shape[2:] == (1, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_the_gradient_is_rounded_once(gpu, layout) -> None:
    """1 + 3 * 2^-9 is between bfloat16's values; adding 2^-9 at a time to 1 leaves it at 1."""
    grad = torch.full((1, 16, 8, 16), 2.0**-9, dtype=torch.bfloat16, device=gpu.device)
    grad[..., ::2, ::2] = 1
    found = torch.ops.fastdiff.upsample_nearest2x_backward(grad.contiguous(memory_format=layout))
    assert torch.equal(found, torch.full_like(found, 1 + 2.0**-7))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_layouts_agree_to_the_last_bit(gpu, dtype) -> None:
    grad = make(gpu, (2, 5, 6, 14), dtype, torch.contiguous_format)
    backward = torch.ops.fastdiff.upsample_nearest2x_backward
    found = backward(grad.contiguous(memory_format=torch.channels_last))
    assert torch.equal(backward(grad), found)


def test_strides(gpu) -> None:
    x = make(gpu, (2, 6, 4, 5), torch.float32, torch.channels_last)[:, ::2]
    assert torch.equal(ops.upsample_nearest2x(x), spread(x))
    grad = make(gpu, (2, 6, 4, 8), torch.float32, torch.contiguous_format)[:, 1::2]
    backward = torch.ops.fastdiff.upsample_nearest2x_backward
    assert torch.equal(backward(grad), backward(grad.contiguous()))
    shifted = make(gpu, (1, 1, 1, 33), torch.float32, torch.contiguous_format).flatten()[1:]
    x = shifted.view(1, 2, 2, 8)  # whole vectors, none at a multiple of 16 bytes
    assert torch.equal(ops.upsample_nearest2x(x), spread(x))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_nothing(gpu, shape) -> None:
    x = torch.empty(shape, device=gpu.device)
    n, c, h, w = shape
    y = ops.upsample_nearest2x(x)
    assert y.shape == (n, c, 2 * h, 2 * w)
    assert torch.ops.fastdiff.upsample_nearest2x_backward(y).shape == shape
