"""add_time_embedding on the GPU kernels."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

from fastdiff import ops

SHAPES = {
    "whole vectors": (2, 32, 8, 8),
    "short rows": (2, 48, 2, 4),
    "odd": (3, 37, 5, 7),
    "one pixel": (2, 16, 1, 1),
    "one channel": (3, 1, 6, 6),
    "several tiles": (1, 4, 20, 12),
}


def make(gpu, shape, dtype, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(gpu.device, dtype)
    emb = torch.randn(shape[:2], generator=g).to(gpu.device, dtype)
    return x.contiguous(memory_format=layout).requires_grad_(), emb.requires_grad_()


def run(x, emb):
    y = ops.add_time_embedding(x, emb)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, emb))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(gpu, shape, dtype, layout) -> None:
    assert_close_to_oracle(run, *make(gpu, shape, dtype, layout))


@pytest.mark.parametrize("dims", [0, 1, 3], ids=["no pixels", "1d", "3d"])
def test_other_numbers_of_dimensions(gpu, dims) -> None:
    assert_close_to_oracle(run, *make(gpu, (2, 5, *range(3, 3 + dims)), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_rounds_once_and_keeps_strides(gpu, dtype) -> None:
    x, emb = (value.detach() for value in make(gpu, (2, 16, 6, 6), dtype, torch.channels_last))
    y = ops.add_time_embedding(x, emb)
    assert y.stride() == x.stride()
    wanted = (x.double() + emb.double()[:, :, None, None]).to(dtype)
    assert torch.equal(y, wanted)
    part, row = x[:, ::2, 1:], emb[:1, ::2].expand(2, -1)
    assert torch.equal(ops.add_time_embedding(part, row), part + row[:, :, None, None])


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)], ids=str)
def test_nothing(gpu, shape) -> None:
    x, emb = make(gpu, shape, torch.float32)
    assert ops.add_time_embedding(x, emb).shape == shape
