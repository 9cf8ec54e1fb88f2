"""group_norm_silu: values, gradients, layouts, and everything it must refuse or survive."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import (
    DTYPE_IDS,
    DTYPES,
    LAYOUT_IDS,
    LAYOUTS,
    CountCalls,
    assert_as_accurate,
    upstream,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops

OPTIONS = ("weight", "bias", "add", "scale", "shift", "residual")

# N, C, spatial..., groups
SHAPES = {
    "vector tails": ((3, 12, 5, 7), 3),
    "one pixel": ((2, 8, 1, 1), 2),
    "one channel a group": ((2, 40, 9, 3), 40),
    "one group": ((2, 24, 6, 6), 1),
    "groups across vectors": ((2, 40, 8, 8), 8),
    "stable diffusion's 10 a group": ((1, 320, 8, 8), 32),
    "ddpm's block": ((2, 128, 16, 16), 32),
    "many blocks of pixels": ((1, 8, 67, 71), 2),
    "one image, wide": ((1, 512, 4, 4), 32),
}

DATA = {
    "centred": lambda x: x,
    "mean 100 deviations": lambda x: x * 0.5 + 50,
    "drifting": lambda x: x * 0.1 + torch.linspace(-20, 20, x.shape[-2])[:, None],
    "outlier first": lambda x: x.index_put((torch.tensor(0),) * 4, torch.tensor(300.0)),
    "channels apart": lambda x: x + torch.linspace(-40, 40, x.shape[1])[:, None, None],
}


def make(shape, dtype, layout, options, seed=0, data=DATA["centred"]):
    """x and the options' tensors, leaves that require gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g)

    n, c = shape[:2]
    x = data(normal(*shape)).to(dtype)
    values = {"x": x.contiguous(memory_format=layout)}
    for name in options:
        if name == "residual":
            values[name] = normal(*shape).to(dtype).contiguous(memory_format=layout)
        else:
            size = (c,) if name in ("weight", "bias") else (n, c)
            values[name] = (normal(*size) * 0.5).to(dtype)
    return {name: value.requires_grad_() for name, value in values.items()}


def call(groups, names, silu=True):
    """A function of the tensors and of y's gradient that returns y and every gradient."""

    def run(*tensors: Tensor):
        *inputs, dy = tensors
        values = dict(zip(names, inputs, strict=True))
        y = ops.group_norm_silu(num_groups=groups, silu=silu, **values)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    return run


def judge(groups, values, silu=True, cancelling=False) -> None:
    run = call(groups, list(values), silu)
    assert_as_accurate(run, *values.values(), upstream(values["x"]), cancelling=cancelling)


@pytest.mark.parametrize("options", [(), OPTIONS], ids=["bare", "everything"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, groups, dtype, layout, options) -> None:
    values = make(shape, dtype, layout, options)
    # Where each channel has a group of its own, what is added to it has no effect or gradient.
    judge(groups, values, cancelling=groups == shape[1])


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("options", [("weight", "bias"), OPTIONS], ids=["affine", "everything"])
def test_ill_scaled_data(data, layout, options) -> None:
    values = make((2, 32, 24, 20), torch.float32, layout, options, data=data)
    judge(8, values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_a_mean_of_ten_thousand_beside_a_deviation_of_a_tenth(layout) -> None:
    """Where PyTorch's channels-last float32 result is off by more than 100."""
    x = torch.randn(2, 16, 40, 40) * 0.1 + 1e4
    y = ops.group_norm_silu(x.contiguous(memory_format=layout), 4)
    with fastdiff.backend("reference"):
        wanted = ops.group_norm_silu(x.double(), 4)
    assert (y - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "identity"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone(option, layout, silu) -> None:
    values = make((2, 24, 5, 6), torch.float32, layout, (option,))
    judge(4, values, silu)


@pytest.mark.parametrize("channels", [(8, 16), (5, 7), (12, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_two_inputs_are_as_good_as_their_concatenation(channels, dtype, layout) -> None:
    values = make((2, sum(channels), 5, 6), dtype, layout, OPTIONS)
    names = [name for name in values if name != "x"]
    x, skip = (
        part.detach().contiguous(memory_format=layout).requires_grad_()
        for part in values.pop("x").split(channels, dim=1)
    )

    def run(x, skip, *others):
        *others, dy = others
        options = dict(zip(names, others, strict=True))
        y = ops.group_norm_silu(x, 4, skip=skip, **options)
        return [y.detach(), *torch.autograd.grad(y, (x, skip, *others), dy)]

    assert_as_accurate(run, x, skip, *values.values(), upstream(torch.cat((x, skip), dim=1)))
    y = ops.group_norm_silu(x, 4, skip=skip)
    joined = torch.cat((x, skip), dim=1).contiguous(memory_format=layout)
    assert torch.equal(y, ops.group_norm_silu(joined, 4))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dims", [0, 1, 3], ids=["no pixels", "1d", "3d"])
def test_other_numbers_of_dimensions(dims) -> None:
    x = torch.randn(2, 24, *range(3, 3 + dims), requires_grad=True)
    judge(3, {"x": x})


@settings(max_examples=100)
@given(
    n=st.integers(1, 3), groups=st.integers(1, 6), per_group=st.integers(1, 19),
    height=st.integers(1, 12), width=st.integers(1, 12),
    layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
    options=st.lists(st.sampled_from(OPTIONS), unique=True),
)  # fmt: skip
def test_any_shape(n, groups, per_group, height, width, layout, dtype, options) -> None:
    assume(per_group * height * width > 4)  # of a few values the gradient is all but cancelled
    values = make((n, groups * per_group, height, width), dtype, layout, options, seed=n)
    judge(groups, values, cancelling=True)


def test_keeps_shape_dtype_and_layout() -> None:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        x = torch.randn(2, 8, 3, 5).to(dtype).contiguous(memory_format=layout)
        y = ops.group_norm_silu(x, 4)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


def test_tensors_that_are_not_contiguous() -> None:
    wide = torch.randn(2, 16, 9, 10)
    x = wide[:, ::2, 1:, ::3].requires_grad_()
    add = torch.randn(1, 8).expand(2, 8).requires_grad_()
    scale, shift = torch.randn(2, 16).chunk(2, dim=1)
    values = {"x": x, "add": add, "scale": scale.requires_grad_(), "shift": shift.requires_grad_()}
    judge(4, values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=["no images", "no pixels"])
def test_nothing_to_do(shape, layout) -> None:
    x = torch.empty(shape).contiguous(memory_format=layout).requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    y = ops.group_norm_silu(x, 4, weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(8))


def test_touches_nothing_outside_its_output() -> None:
    """Inputs lie in the middle of NaNs: reading beyond them would show in the result."""
    for layout in LAYOUTS:
        memory = torch.full((3, 5 * 7 * 11), torch.nan)
        memory[1] = torch.randn(5 * 7 * 11)
        size, strides = (1, 5, 7, 11), (385, 77, 11, 1)
        if layout == torch.channels_last:
            strides = (385, 1, 55, 5)
        x = memory.as_strided(size, strides, storage_offset=385)
        assert torch.isfinite(ops.group_norm_silu(x, 5)).all()
        assert torch.isnan(memory[::2]).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_nan_stays_in_its_group(layout) -> None:
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=layout)
    x[1, 9, 4, 4] = torch.nan
    broken = torch.isnan(ops.group_norm_silu(x, 8)).flatten(2).any(-1)
    wanted = torch.zeros(2, 32, dtype=torch.bool)
    wanted[1, 8:12] = True
    assert torch.equal(broken, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_threads_do_not_change_the_result(layout) -> None:
    values = make((3, 64, 32, 32), torch.float32, layout, ("weight", "bias"))
    run, threads, results = call(8, list(values)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(*values.values(), upstream(values["x"])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_is_one_dispatcher_call() -> None:
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8)
    with CountCalls() as counted:
        ops.group_norm_silu(x, 4, weight)
    assert counted.names == ["fastdiff.group_norm_silu.default"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_opcheck(layout) -> None:
    values = make((2, 8, 3, 5), torch.float32, layout, OPTIONS)
    arguments = [values[name] for name in ("add", "scale", "shift", "residual")]
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_silu.default,
        (values["x"], 4, values["weight"], values["bias"], 1e-5, *arguments, True, None, None),
    )


def test_gradcheck() -> None:
    values = make((2, 6, 3, 2), torch.float64, torch.channels_last, OPTIONS)
    names = list(values)

    def run(*tensors):
        return ops.group_norm_silu(num_groups=3, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(values.values()))


def test_compiles_without_a_break() -> None:
    values = make((2, 8, 4, 4), torch.float32, torch.channels_last, OPTIONS)
    names = list(values)

    def run(*tensors):
        y = ops.group_norm_silu(num_groups=4, **dict(zip(names, tensors, strict=True)))
        return y * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = tuple(values.values())
    a, b = run(*tensors), compiled(*tensors)
    assert torch.equal(a, b)
    for left, right in zip(
        torch.autograd.grad(a.sum(), tensors), torch.autograd.grad(b.sum(), tensors), strict=True
    ):
        assert torch.equal(left, right)


X, STATISTICS = torch.randn(2, 6, 4, 4), torch.zeros(2, 3, dtype=torch.float64)
REFUSED = {
    "groups": lambda op, back: op(X, 4, *[None] * 2, 1e-5, *[None] * 4, True),
    "zero groups": lambda op, back: op(X, 0, *[None] * 2, 1e-5, *[None] * 4, True),
    "weight": lambda op, back: op(X, 3, X[0, :5, 0, 0], None, 1e-5, *[None] * 4, True),
    "add": lambda op, back: op(X, 3, None, None, 1e-5, X[:1, :, 0, 0], *[None] * 3, True),
    "dtype": lambda op, back: op(X, 3, torch.ones(6).half(), None, 1e-5, *[None] * 4, True),
    "residual": lambda op, back: op(X, 3, *[None] * 2, 1e-5, *[None] * 3, X[:1], True),
    "skip": lambda op, back: op(X, 3, *[None] * 2, 1e-5, *[None] * 4, True, skip=X[:, :3, :2]),
    "another skip": lambda op, back: op(X, 3, *[None] * 2, 1e-5, *[None] * 4, True, skip=X[0]),
    "integers": lambda op, back: op(X.long(), 3, *[None] * 2, 1e-5, *[None] * 4, True),
    "vector": lambda op, back: op(X[0, 0, 0], 3, *[None] * 2, 1e-5, *[None] * 4, True),
    "grad": lambda op, back: back(X[:1], X, STATISTICS, STATISTICS, 3, *[None] * 5, True),
    "mean": lambda op, back: back(X, X, STATISTICS[:1], STATISTICS, 3, *[None] * 5, True),
    "rstd": lambda op, back: back(X, X, STATISTICS, STATISTICS.float(), 3, *[None] * 5, True),
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
def test_the_kernel_checks_for_itself(bad) -> None:
    """Whoever calls the op directly, past the Python checks, gets an exception too."""
    with pytest.raises((TypeError, ValueError)):
        bad(
            lambda *args, skip=None: torch.ops.fastdiff.group_norm_silu(*args, skip, None),
            lambda *args: torch.ops.fastdiff.group_norm_silu_backward(*args, None),
        )
