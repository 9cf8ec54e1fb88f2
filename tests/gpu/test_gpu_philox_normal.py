"""philox_normal on the GPU kernels: the reference's noise in every dtype, shape and layout."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPE_IDS, DTYPES

import fastdiff
from fastdiff import ops

WORD = 0xFFFFFFFF
SEEDS = torch.tensor([[0, 0], [-1, 3], [2**40 + 7, 2**32 + 1], [2**63 - 1, WORD]])
SHAPES = {
    "image": (4, 3, 8, 8),
    "odd": (4, 3, 5, 7),
    "one pixel": (4, 6, 1, 1),
    "latent": (4, 4, 8, 12),
    "vector": (4, 5),
    "number": (4,),
    "volume": (4, 2, 3, 3, 2),
}


def exact(row, shape):
    with fastdiff.backend("reference"):
        return ops.philox_normal(SEEDS[: shape[0]], row, shape, torch.float64)


def error(found, wanted):
    """In units of the dtype's precision at 1 or more."""
    unit = torch.finfo(found.dtype).eps
    return ((found.cpu().double() - wanted).abs() / wanted.abs().clamp(min=1)).max().item() / unit


def tolerance(dtype):
    return 3 if dtype == torch.float32 else 0.51


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(gpu, shape, dtype) -> None:
    found = ops.philox_normal(SEEDS.to(gpu.device), 12345, shape, dtype)
    assert (found.shape, found.dtype) == (shape, dtype)
    assert error(found, exact(12345, shape)) <= tolerance(dtype)


@pytest.mark.parametrize("row", [0, 1, 16, 2**31 - 1, 2**31, WORD], ids=hex)
def test_any_row(gpu, row) -> None:
    found = ops.philox_normal(SEEDS.to(gpu.device), row, (4, 37))
    assert error(found, exact(row, (4, 37))) <= tolerance(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (4, 4, 5, 3)], ids=str)
def test_layouts_hold_the_same_noise(gpu, shape, dtype) -> None:
    seeds = SEEDS.to(gpu.device)
    wanted = ops.philox_normal(seeds, 7, shape, dtype)
    for memory in (
        torch.full(shape, torch.nan, dtype=dtype, device=gpu.device).contiguous(
            memory_format=torch.channels_last
        ),
        torch.full((*shape, 2), torch.nan, dtype=dtype, device=gpu.device)[..., 1],
        torch.full(shape[::-1], torch.nan, dtype=dtype, device=gpu.device).permute(3, 2, 1, 0),
    ):
        torch.ops.fastdiff.philox_normal(seeds, 7, memory)
        assert torch.equal(memory, wanted)


def test_what_lies_beside_is_not_written(gpu) -> None:
    memory = torch.zeros(4, 7, 6, device=gpu.device)
    seeds = SEEDS.to(gpu.device)
    torch.ops.fastdiff.philox_normal(seeds, 3, memory[..., ::2])
    assert torch.equal(memory[..., ::2], ops.philox_normal(seeds, 3, (4, 7, 3)))
    assert not memory[..., 1::2].any()
    flat = torch.zeros(4 * 21 + 2, device=gpu.device)
    torch.ops.fastdiff.philox_normal(seeds, 3, flat[1:-1].view(4, 21))
    assert flat[0] == 0 == flat[-1]
    assert torch.equal(flat[1:-1].view(4, 21), ops.philox_normal(seeds, 3, (4, 21)))


def test_a_value_depends_on_nothing_else(gpu) -> None:
    """Not on the batch, the number of elements, or the strides of the seeds."""
    seeds = SEEDS.to(gpu.device)
    z = ops.philox_normal(seeds, 2, (4, 3, 10, 9))
    for n in range(4):
        assert torch.equal(ops.philox_normal(seeds[n : n + 1], 2, (1, 3, 10, 9)), z[n : n + 1])
    for count in (1, 3, 64, 65, 270):
        assert torch.equal(ops.philox_normal(seeds, 2, (4, count)), z.flatten(1)[:, :count])
    spread = torch.stack([seeds, seeds], dim=2)[..., 0]
    assert torch.equal(ops.philox_normal(spread, 2, z.shape), z)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 4), (0,)], ids=str)
def test_nothing(gpu, shape) -> None:
    assert ops.philox_normal(SEEDS[: shape[0]].to(gpu.device), 0, shape).shape == shape
