"""sampler_step: the row's formula, learned variance, layouts and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import ops
from fastdiff.ops.sampler_step import ROW
from fastdiff.samplers import COLUMNS

SHAPES = {"odd": (3, 3, 5, 7), "latent": (2, 4, 8, 8), "one pixel": (2, 5, 1, 1)}
KINDS = {"plain": (False, False), "noise": (True, False), "learned": (True, True),
         "learned, last step": (False, True)}  # fmt: skip


def make(shape, dtype, noisy, learned, layout=torch.contiguous_format, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        value = torch.randn(size, generator=g).to(dtype)
        return value.contiguous(memory_format=layout) if len(size) == 4 else value

    n, c = shape[:2]
    table = torch.rand(6, ROW, generator=g) * 2 - 1
    table[:, COLUMNS.index("clip_min")], table[:, COLUMNS.index("clip_max")] = -0.7, 0.9
    table = table.double() if dtype == torch.float64 else table
    out = normal(n, c * (2 if learned else 1), *shape[2:])
    return normal(*shape), out, normal(*shape) if noisy else None, table, torch.tensor(4)


def run(x, model_out, noise, table, step):
    return [ops.sampler_step(x, model_out, noise, table, step)]


@pytest.mark.parametrize(("noisy", "learned"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(shape, dtype, layout, noisy, learned) -> None:
    assert_as_accurate(run, *make(shape, dtype, noisy, learned, layout))


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS), kind=st.sampled_from(list(KINDS.values())),
)  # fmt: skip
def test_any_shape(shape, dtype, layout, kind) -> None:
    assert_as_accurate(run, *make(shape, dtype, *kind, layout))


def test_the_formula() -> None:
    row = dict(zip(COLUMNS, range(1, 11), strict=True), clip_min=-2, clip_max=50, logvar=0.5)
    table = torch.tensor([[0.0] * 10, [row[name] for name in COLUMNS]])
    x, m, v, z = 0.3, 0.2, -0.25, 0.7
    x0 = min(max(1 * x + 2 * m, -2), 50)
    deviation = math.exp((0.5 + 10 * v) / 2)
    wanted = 5 * x + 6 * x0 + 7 * m + 8 * deviation * z
    image = torch.full((1, 1, 1, 1), x)
    out = torch.tensor([m, v]).view(1, 2, 1, 1)
    got = ops.sampler_step(image, out, torch.full_like(image, z), table, torch.tensor(1))
    assert got.item() == pytest.approx(wanted, rel=1e-6)


def test_no_clipping_and_infinite_limits() -> None:
    x, out, _, table, step = make((2, 3, 4, 4), torch.float32, False, False)
    table[:, 2], table[:, 3] = -torch.inf, torch.inf
    assert_as_accurate(run, x * 1e6, out, None, table, step)


def test_keeps_nan_where_it_is() -> None:
    x, out, _, table, step = make((2, 3, 4, 5), torch.float32, False, False)
    out[1, 2, 3, 4] = torch.nan
    broken = torch.isnan(ops.sampler_step(x, out, None, table, step))
    assert torch.equal(broken, torch.isnan(out))


def test_layouts_strides_and_nothing() -> None:
    x, out, noise, table, step = make((2, 4, 6, 6), torch.float32, True, True)
    plain = ops.sampler_step(x, out, noise, table, step)
    mixed = ops.sampler_step(
        x.contiguous(memory_format=torch.channels_last), out, noise[:, :], table[:, :], step
    )
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mixed, plain)
    wide = out.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(ops.sampler_step(x, wide, noise, table, step.view(1)), plain)
    assert ops.sampler_step(x[:0], out[:0], noise[:0], table, step).shape == (0, 4, 6, 6)


def test_opcheck_compile_and_one_call() -> None:
    arguments = make((2, 4, 6, 6), torch.float32, True, True)
    torch.library.opcheck(torch.ops.fastdiff.sampler_step.default, arguments)
    compiled = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.sampler_step(*arguments))
    with CountCalls() as counted:
        ops.sampler_step(*arguments)
    assert counted.names == ["fastdiff.sampler_step.default"]


def test_the_row_is_read_when_it_runs() -> None:
    """A compiled or captured loop advances the step in place."""
    x, out, _, table, step = make((2, 3, 4, 4), torch.float32, False, False)
    compiled = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    compiled(x, out, None, table, step)
    step.fill_(1)
    assert torch.equal(
        compiled(x, out, None, table, step), ops.sampler_step(x, out, None, table, torch.tensor(1))
    )


X, TABLE, STEP = torch.randn(2, 3, 4, 4), torch.rand(5, ROW), torch.tensor(0)
REFUSED = {
    "step above": ((X, X, None, TABLE, STEP + 5), IndexError),
    "step below": ((X, X, None, TABLE, STEP - 1), IndexError),
    "no rows": ((X, X, None, TABLE[:0], STEP), IndexError),
    "step of another dtype": ((X, X, None, TABLE, STEP.int()), TypeError),
    "two steps": ((X, X, None, TABLE, STEP.expand(2)), TypeError),
    "columns": ((X, X, None, TABLE[:, :9], STEP), ValueError),
    "table of another dtype": ((X, X, None, TABLE.double(), STEP), TypeError),
    "output of another shape": ((X, X[:1], None, TABLE, STEP), ValueError),
    "output of three times the channels": (
        (X, X.repeat(1, 3, 1, 1), None, TABLE, STEP),
        ValueError,
    ),
    "output of another dtype": ((X, X.half(), None, TABLE, STEP), TypeError),
    "noise of another shape": ((X, X, X[:1], TABLE, STEP), ValueError),
    "noise of another dtype": ((X, X, X.half(), TABLE, STEP), TypeError),
    "integers": ((X.long(), X.long(), None, TABLE, STEP), TypeError),
    "vector": ((X[0, 0, 0], X[0, 0, 0], None, TABLE, STEP), ValueError),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_the_kernel_checks_for_itself(arguments, error) -> None:
    with pytest.raises(error):
        torch.ops.fastdiff.sampler_step.default(*arguments)
    with pytest.raises(error):
        ops.sampler_step(*arguments)
