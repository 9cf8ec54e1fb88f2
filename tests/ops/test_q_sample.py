"""q_sample and q_sample_from_seed: values, gradients, layouts and refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import ops, schedules

SCHEDULE = schedules.cosine(1000)
SHAPES = {
    "image": (3, 3, 5, 7), "latent": (2, 4, 40, 40), "one channel": (2, 1, 8, 8),
    "many channels": (2, 70, 9, 5), "pixel": (2, 5, 1, 1), "vector": (5, 3), "numbers": (4,),
    "volume": (2, 3, 4, 5, 6),
}  # fmt: skip
ROW = torch.tensor([9])


def tables(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return SCHEDULE.coefficients(torch.device("cpu"), wide)


def make(shape, dtype, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    x0, noise = (
        torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout) for _ in range(2)
    )
    t = torch.randint(1000, shape[:1], generator=g)
    return x0.requires_grad_(), t, noise.requires_grad_()


def run(x0, t, noise):
    y = ops.q_sample(x0, t, noise, *tables(x0.dtype))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x0, noise))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, dtype, layout) -> None:
    assert_as_accurate(run, *make(shape, dtype, layout))


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, dtype) -> None:
    assert_as_accurate(run, *make(shape, dtype))


def test_keeps_layout_and_dtype() -> None:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            x0, t, noise = make((2, 3, 4, 5), dtype, layout)
            y = ops.q_sample(x0, t, noise, *tables(dtype))
            assert (y.dtype, y.stride()) == (dtype, x0.stride())


def test_mixed_layouts_and_strides() -> None:
    x0, t, noise = make((2, 6, 4, 5), torch.float32, torch.channels_last)
    noise = noise.detach().contiguous()
    x0, noise = x0.detach()[:, ::2], noise[:, ::2]
    wanted = [
        SCHEDULE.sqrt_alphas_cumprod[s] * a + SCHEDULE.sqrt_one_minus_alphas_cumprod[s] * e
        for s, a, e in zip(t, x0.double(), noise.double(), strict=True)
    ]
    torch.testing.assert_close(
        ops.q_sample(x0, t, noise, *tables(torch.float32)), torch.stack(wanted).float()
    )


def test_rounds_once() -> None:
    """Every timestep gets its own noise level in bfloat16 too (tables rounded first lose it)."""
    x0, noise = torch.zeros(1000, 1, dtype=torch.bfloat16), torch.ones(1000, 1).bfloat16()
    y = ops.q_sample(x0, torch.arange(1000), noise, *tables(torch.bfloat16))
    assert torch.equal(y[:, 0], SCHEDULE.sqrt_one_minus_alphas_cumprod.bfloat16())
    assert bool((y > 0).all())


def test_no_images() -> None:
    x0 = torch.empty(0, 3, 4, 4)
    t = torch.empty(0, dtype=torch.int64)
    assert ops.q_sample(x0, t, x0, *tables(x0.dtype)).shape == x0.shape


def test_is_one_dispatcher_call() -> None:
    x0, t, noise = make((2, 3, 4, 4), torch.float32)
    with CountCalls() as counted:
        ops.q_sample(x0, t, noise, *tables(x0.dtype))
    assert counted.names == ["fastdiff.q_sample.default"]


def test_opcheck_and_compile() -> None:
    x0, t, noise = make((2, 3, 4, 5), torch.float32, torch.channels_last)
    torch.library.opcheck(torch.ops.fastdiff.q_sample.default, (x0, t, noise, *tables(x0.dtype)))
    compiled = torch.compile(ops.q_sample, fullgraph=True, backend="aot_eager")
    a, b = (q(x0, t, noise, *tables(x0.dtype)) for q in (ops.q_sample, compiled))
    assert torch.equal(a, b)
    for left, right in zip(
        torch.autograd.grad(a.sum(), (x0, noise)),
        torch.autograd.grad(b.sum(), (x0, noise)),
        strict=True,
    ):
        assert torch.equal(left, right)


def make_seeded(shape, dtype, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    x0 = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout)
    t = torch.randint(1000, shape[:1], generator=g)
    seed = torch.randint(-(2**62), 2**62, (*shape[:1], 2), generator=g)
    return x0.requires_grad_(), t, seed


def run_from_seed(x0, t, seed):
    y = ops.q_sample_from_seed(x0, t, seed, ROW, *tables(x0.dtype))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), x0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_from_seed(shape, dtype, layout) -> None:
    assert_as_accurate(run_from_seed, *make_seeded(shape, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_noise_is_philox_normals_whatever_the_layout(shape, dtype, layout) -> None:
    """Without signal x_t is that noise, times sigma and rounded once."""
    x0, t, seed = make_seeded(shape, dtype, layout)
    _, sigma = tables(dtype)
    found = ops.q_sample_from_seed(x0, t, seed, ROW, torch.zeros_like(sigma), sigma)
    noise = ops.philox_normal(seed, 9, shape, sigma.dtype)
    wanted = sigma[t].view(-1, *[1] * (len(shape) - 1)) * noise
    assert torch.equal(found, wanted.to(dtype))
    assert (found.dtype, found.stride()) == (dtype, x0.stride())


def test_an_image_does_not_depend_on_its_batch_or_threads() -> None:
    x0, t, seed = make_seeded((5, 3, 50, 41), torch.float32, torch.channels_last)
    y = ops.q_sample_from_seed(x0, t, seed, ROW, *tables(x0.dtype))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [
        ops.q_sample_from_seed(x0[n : n + 1], t[n : n + 1], seed[n : n + 1], ROW, *tables(x0.dtype))
        for n in range(5)
    ]
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), y)


def test_rows_differ_and_count_by_their_lowest_32_bits() -> None:
    x0, t, seed = make_seeded((2, 3, 4, 4), torch.float32)
    at = [
        ops.q_sample_from_seed(x0, t, seed, torch.tensor(row), *tables(x0.dtype))
        for row in (9, 10, 9 + 2**32)
    ]
    assert not torch.equal(at[0], at[1])
    assert torch.equal(at[0], at[2])


def test_no_images_and_empty_images_from_seed() -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4), (2, 3, 0, 4)):
        x0, t, seed = make_seeded(shape, torch.float32)
        assert ops.q_sample_from_seed(x0, t, seed, ROW, *tables(x0.dtype)).shape == shape


def test_from_seed_is_one_dispatcher_call() -> None:
    x0, t, seed = make_seeded((2, 3, 4, 4), torch.float32)
    with CountCalls() as counted:
        ops.q_sample_from_seed(x0, t, seed, ROW, *tables(x0.dtype))
    assert counted.names == ["fastdiff.q_sample_from_seed.default"]


def test_opcheck_and_compile_from_seed() -> None:
    x0, t, seed = make_seeded((2, 3, 4, 5), torch.float32, torch.channels_last)
    arguments = (x0, t, seed, ROW, *tables(x0.dtype))
    torch.library.opcheck(torch.ops.fastdiff.q_sample_from_seed.default, arguments)
    compiled = torch.compile(ops.q_sample_from_seed, fullgraph=True, backend="aot_eager")
    a, b = (q(*arguments) for q in (ops.q_sample_from_seed, compiled))
    assert torch.equal(a, b)
    (left,), (right,) = (torch.autograd.grad(v.sum(), x0) for v in (a, b))
    assert torch.equal(left, right)


X, T, TABLE = torch.randn(2, 3, 4, 4), torch.tensor([0, 9]), torch.rand(10)
SEED = torch.tensor([[1, 0], [1, 1]])
REFUSED = {
    "q_sample": {
        "t above": ((X, T + 1, X, TABLE, TABLE), IndexError),
        "t below": ((X, T - 1, X, TABLE, TABLE), IndexError),
        "t of another length": ((X, T[:1], X, TABLE, TABLE), ValueError),
        "t of another dtype": ((X, T.int(), X, TABLE, TABLE), TypeError),
        "noise of another shape": ((X, T, X[:1], TABLE, TABLE), ValueError),
        "noise of another dtype": ((X, T, X.half(), TABLE, TABLE), TypeError),
        "tables of two lengths": ((X, T, X, TABLE, TABLE[:5]), ValueError),
        "tables of another dtype": ((X, T, X, TABLE.double(), TABLE.double()), TypeError),
        "empty tables": ((X, T, X, TABLE[:0], TABLE[:0]), IndexError),
        "integers": ((X.long(), T, X.long(), TABLE, TABLE), TypeError),
        "a number": ((X[0, 0, 0, 0], T, X[0, 0, 0, 0], TABLE, TABLE), ValueError),
    },
    "q_sample_from_seed": {
        "t above": ((X, T + 1, SEED, ROW, TABLE, TABLE), IndexError),
        "t of another length": ((X, T[:1], SEED, ROW, TABLE, TABLE), ValueError),
        "seeds of another batch": ((X, T, SEED[:1], ROW, TABLE, TABLE), ValueError),
        "seeds of another dtype": ((X, T, SEED.int(), ROW, TABLE, TABLE), TypeError),
        "two rows": ((X, T, SEED, T, TABLE, TABLE), TypeError),
        "row of another dtype": ((X, T, SEED, ROW.int(), TABLE, TABLE), TypeError),
        "tables of two lengths": ((X, T, SEED, ROW, TABLE, TABLE[:5]), ValueError),
        "tables of another dtype": ((X, T, SEED, ROW, TABLE.double(), TABLE.double()), TypeError),
        "empty tables": ((X, T, SEED, ROW, TABLE[:0], TABLE[:0]), IndexError),
        "integers": ((X.long(), T, SEED, ROW, TABLE, TABLE), TypeError),
        "a number": ((X[0, 0, 0, 0], T, SEED, ROW, TABLE, TABLE), ValueError),
    },
}


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        pytest.param(name, *refused, id=f"{name}, {what}")
        for name, cases in REFUSED.items()
        for what, refused in cases.items()
    ],
)
def test_the_kernel_checks_for_itself(name, arguments, error) -> None:
    with pytest.raises(error):
        getattr(torch.ops.fastdiff, name).default(*arguments)
    with pytest.raises(error):
        getattr(ops, name)(*arguments)
