"""q_sample and q_sample_from_seed on the GPU kernels."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

from fastdiff import ops, schedules

SCHEDULE = schedules.cosine(1000)
SHAPES = {
    "image": (3, 3, 5, 7),
    "latent": (2, 4, 8, 8),
    "many small": (70, 3, 2, 1),
    "one pixel": (2, 16, 1, 1),
    "vector": (5, 3),
    "numbers": (4,),
    "volume": (2, 3, 2, 3, 4),
}
CASES = [
    pytest.param(shape, layout, id=f"{name} {layout_id}")
    for name, shape in SHAPES.items()
    for layout, layout_id in zip(LAYOUTS, LAYOUT_IDS, strict=True)
    if len(shape) == 4 or layout == torch.contiguous_format
]


def tables(gpu, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return SCHEDULE.coefficients(gpu.device, wide)


def make(gpu, shape, dtype, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    x0, noise = (
        torch.randn(shape, generator=g).to(gpu.device, dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    t = torch.randint(1000, shape[:1], generator=g).to(gpu.device)
    seed = torch.randint(-(2**62), 2**62, (shape[0], 2), generator=g).to(gpu.device)
    return x0, t, noise, seed


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_values_and_gradients(gpu, shape, layout, dtype) -> None:
    x0, t, noise, _ = make(gpu, shape, dtype, layout)

    def run(x0, noise):
        y = ops.q_sample(x0, t, noise, *tables(gpu, x0.dtype))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x0, noise))]

    assert_close_to_oracle(run, x0.requires_grad_(), noise.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_noise_from_a_seed_is_that_of_philox_normal(gpu, shape, layout, dtype) -> None:
    """In float32, of which x_t is what q_sample makes, rounded once, to the last bit."""
    x0, t, _, seed = make(gpu, shape, dtype, layout)
    for row in (17, 2**32 - 1):
        at = torch.tensor([row], device=gpu.device)
        x_t = ops.q_sample_from_seed(x0, t, seed, at, *tables(gpu, dtype))
        assert (x_t.dtype, x_t.stride()) == (dtype, x0.stride())
        noise = ops.philox_normal(seed, row, shape)
        assert torch.equal(x_t, ops.q_sample(x0.float(), t, noise, *tables(gpu, dtype)).to(dtype))


def test_row_counts_by_its_low_word(gpu) -> None:
    x0, t, _, seed = make(gpu, (2, 3, 4, 4), torch.float32)
    rows = (torch.tensor(row, device=gpu.device) for row in (5, 5 + 2**32, 5 - 2**32))
    found = [ops.q_sample_from_seed(x0, t, seed, r, *tables(gpu, x0.dtype)) for r in rows]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_an_unknown_timestep_makes_its_image_nan(gpu, layout) -> None:
    """The device alone knows the timesteps; nothing is read outside of the tables."""
    x0, _, noise, seed = make(gpu, (5, 3, 4, 4), torch.float32, layout)
    t = torch.tensor([0, -1, 999, 1000, -(2**40)], device=gpu.device)
    known, row = [0, 2], torch.zeros(1, dtype=torch.int64, device=gpu.device)
    # The operations themselves: beside a CPU tensor the public functions refuse such timesteps.
    results = (
        torch.ops.fastdiff.q_sample(x0, t, noise, *tables(gpu, x0.dtype)),
        torch.ops.fastdiff.q_sample_from_seed(x0, t, seed, row, *tables(gpu, x0.dtype)),
    )
    for x_t in results:
        finite = torch.isfinite(x_t).flatten(1)
        assert finite[known].all()
        assert x_t[[1, 3, 4]].isnan().all()


def test_rounds_once(gpu) -> None:
    """Every timestep gets its own noise level in bfloat16 too."""
    x0 = torch.zeros(1000, 1, dtype=torch.bfloat16, device=gpu.device)
    t = torch.arange(1000, device=gpu.device)
    y = ops.q_sample(x0, t, torch.ones_like(x0), *tables(gpu, x0.dtype))
    assert torch.equal(y[:, 0].cpu(), SCHEDULE.sqrt_one_minus_alphas_cumprod.bfloat16())


def test_mixed_layouts_and_strides(gpu) -> None:
    x0, t, noise, seed = make(gpu, (2, 6, 4, 5), torch.float32, torch.channels_last)
    x0, noise = x0[:, ::2], noise.contiguous()[:, ::2]
    t = torch.stack([t, t], dim=1)[:, 0]
    wanted = ops.q_sample(
        x0.contiguous(), t.contiguous(), noise.contiguous(), *tables(gpu, x0.dtype)
    )
    assert torch.equal(ops.q_sample(x0, t, noise, *tables(gpu, x0.dtype)), wanted)
    row = torch.tensor([3], device=gpu.device)
    spread = torch.stack([seed, seed], dim=2)[..., 0]
    wanted = ops.q_sample(x0, t, ops.philox_normal(seed, 3, x0.shape), *tables(gpu, x0.dtype))
    found = ops.q_sample_from_seed(x0, t, spread, row, *tables(gpu, x0.dtype))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_nothing(gpu, shape) -> None:
    x0, t, noise, seed = make(gpu, shape, torch.float32)
    row = torch.zeros(1, dtype=torch.int64, device=gpu.device)
    assert ops.q_sample(x0, t, noise, *tables(gpu, x0.dtype)).shape == shape
    assert ops.q_sample_from_seed(x0, t, seed, row, *tables(gpu, x0.dtype)).shape == shape
