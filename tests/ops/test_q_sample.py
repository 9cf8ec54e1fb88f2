"""q_sample: values, gradients, layouts and refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import ops, schedules

SCHEDULE = schedules.cosine(1000)
SHAPES = {"image": (3, 3, 5, 7), "latent": (2, 4, 8, 8), "vector": (5, 3), "numbers": (4,)}


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


X, T, TABLE = torch.randn(2, 3, 4, 4), torch.tensor([0, 9]), torch.rand(10)
REFUSED = {
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
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_the_kernel_checks_for_itself(arguments, error) -> None:
    with pytest.raises(error):
        torch.ops.fastdiff.q_sample.default(*arguments)
    with pytest.raises(error):
        ops.q_sample(*arguments)
