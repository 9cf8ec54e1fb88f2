"""norm_backward: gradients against autograd's, layouts, dtypes, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPE_IDS, DTYPES, LAYOUTS, CountCalls, amid_nans, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops

OPTIONS = ("weight", "bias", "scale", "shift")
CL = torch.channels_last

# N, C, C', H, W, groups
CASES = {
    "vector tails": (3, 12, 0, 5, 7, 3),
    "one pixel": (2, 8, 0, 1, 1, 2),
    "one channel a group": (2, 40, 0, 9, 3, 40),
    "one group": (2, 24, 0, 6, 6, 1),
    "stable diffusion's 10 a group": (1, 320, 0, 8, 8, 32),
    "many rows": (1, 8, 0, 67, 71, 2),
    "a skip": (2, 64, 64, 8, 8, 32),
    "a group across both": (2, 13, 11, 6, 5, 4),
    "a wide skip": (2, 5, 91, 4, 3, 8),
    "a skip of nothing": (2, 12, 0, 4, 4, 3),
    "no channels before the skip": (2, 0, 12, 4, 4, 3),
}


def make(case, dtype=torch.float32, names=OPTIONS, parameters=None, seed=0, rows=None):
    """Gradient of y, the inputs, and the options' tensors."""
    n, c, extra, h, w, _ = case
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g)

    def image(channels):
        return (normal(n, channels, h, w) + 0.5).to(dtype).contiguous(memory_format=CL)

    channels = c + extra
    values = {"grad": image(channels), "x": image(c), "skip": image(extra) if extra else None}
    for name in names:
        size = (channels,) if name in ("weight", "bias") else (rows or n, channels)
        values[name] = (normal(*size) * 0.5).to(parameters or dtype)
    return values


def run_by_us(groups, names, silu=True, in_place=False):
    """A function of the tensors of ``make`` that returns every gradient."""

    def run(*tensors: Tensor | None):
        values = dict(zip(names, tensors, strict=True))
        grad, x, skip = (values.pop(name) for name in ("grad", "x", "skip"))
        parts = [x] if skip is None else [x, skip]
        statistics = [ops.channel_statistics(part) for part in parts] if groups else []
        if in_place:
            grad = grad.contiguous(memory_format=CL).clone()
        found = ops.norm_backward(
            grad, x, statistics, groups, skip=skip, silu=silu, in_place=in_place, **values
        )
        return [value for value in found if value is not None]

    return run


def by_autograd(groups, silu, values, eps=1e-5):
    """The same gradients by PyTorch in float64."""
    leaves = {
        name: value.double().contiguous().requires_grad_()
        for name, value in values.items()
        if value is not None and name != "grad"
    }
    x = torch.cat([leaves[name] for name in ("x", "skip") if name in leaves], dim=1)
    h = torch.group_norm(x, groups, leaves.get("weight"), leaves.get("bias"), eps) if groups else x
    if "scale" in leaves:
        h = h * (1 + leaves["scale"][:, :, None, None])
    if "shift" in leaves:
        h = h + leaves["shift"][:, :, None, None]
    y = F.silu(h) if silu else h
    grads = torch.autograd.grad(y, list(leaves.values()), values["grad"].double())
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("names", [(), ("weight", "bias"), OPTIONS], ids=["bare", "affine", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, dtype, names) -> None:
    values = make(case, dtype, names)
    groups = case[-1]
    run = run_by_us(groups, list(values))
    assert_as_accurate(run, *values.values(), cancelling=groups == case[1])


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "identity"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_autograd(backend, case, silu) -> None:
    values = make(case, torch.float64)
    with fastdiff.backend(backend):
        found = run_by_us(case[-1], list(values), silu)(*values.values())
    wanted = by_autograd(case[-1], silu, values)
    for name, value in zip(wanted, found, strict=True):
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_alone(name) -> None:
    values = make((2, 24, 8, 5, 6, 4), names=(name,))
    assert_as_accurate(run_by_us(4, list(values)), *values.values())


@pytest.mark.parametrize("rows", [1, 3], ids=["one row", "a row an image"])
def test_scale_and_shift_of_all_images(rows) -> None:
    values = make((3, 24, 8, 5, 6, 4), rows=rows)
    assert_as_accurate(run_by_us(4, list(values)), *values.values())
    found = run_by_us(4, list(values))(*values.values())
    assert [value.shape for value in found[-2:]] == [(rows, 32), (rows, 32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_parameters_in_float32_beside_images_in_half_precision(dtype) -> None:
    """As under autocast. Their gradients are as accurate as float32 is."""
    case = (2, 24, 8, 5, 6, 4)
    values = make(case, dtype, parameters=torch.float32)
    found = run_by_us(4, list(values))(*values.values())
    assert [value.dtype for value in found] == [dtype] * 2 + [torch.float32] * 4
    wanted = list(by_autograd(4, True, values).values())
    for value, exact in zip(found[2:], wanted[2:], strict=True):
        # The weights' sums are of du before it is rounded, with the exponential of the dtype.
        bound = 1e-3 if dtype == torch.bfloat16 else 1e-4
        assert (value - exact).norm() <= bound * exact.norm()
    assert_as_accurate(run_by_us(4, list(values)), *values.values(), formula=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("channels", [(12, 0), (13, 20)], ids=["alone", "with a skip"])
def test_silu_without_a_norm(channels, dtype) -> None:
    values = make((2, *channels, 5, 7, 0), dtype, ())
    assert_as_accurate(run_by_us(0, list(values)), *values.values())
    if dtype == torch.float64:
        found = run_by_us(0, list(values))(*values.values())
        for value, wanted in zip(found, by_autograd(0, True, values).values(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "silu"), [(4, True), (4, False), (0, True)], ids=["both", "norm", "silu"]
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_in_place_is_the_same(backend, silu, groups) -> None:
    values = make((2, 13, 19, 5, 7, 4), names=OPTIONS if groups else ())
    with fastdiff.backend(backend):
        plain = run_by_us(groups, list(values), silu)(*values.values())
        written = run_by_us(groups, list(values), silu, in_place=True)(*values.values())
    assert all(map(torch.equal, plain, written))
    grad, x, skip = values["grad"], values["x"], values["skip"]
    statistics = [ops.channel_statistics(x), ops.channel_statistics(skip)] if groups else []
    before = grad._version
    with fastdiff.backend(backend):
        found = ops.norm_backward(grad, x, statistics, groups, silu=silu, skip=skip, in_place=True)
    assert found.x.data_ptr() == grad.data_ptr()
    assert torch.equal(torch.cat((found.x, found.skip), dim=1), grad)
    assert grad._version > before


def test_views_of_some_channels_are_read_where_they_lie() -> None:
    values = make((2, 12, 20, 5, 7, 4))
    plain = run_by_us(4, list(values))(*values.values())
    views = dict(values)
    for name in ("grad", "x", "skip"):
        part = values[name]
        wide = torch.full((2, part.shape[1] + 9, 5, 7), torch.nan).contiguous(memory_format=CL)
        views[name] = wide[:, 4 : 4 + part.shape[1]].copy_(part)
    assert all(map(torch.equal, plain, run_by_us(4, list(values))(*views.values())))
    grad = views["grad"]
    statistics = [ops.channel_statistics(views[name]) for name in ("x", "skip")]
    options = {name: views[name] for name in OPTIONS}
    found = ops.norm_backward(
        grad, views["x"], statistics, 4, skip=views["skip"], in_place=True, **options
    )
    assert torch.equal(found.x, plain[0])
    assert torch.equal(found.skip, plain[1])
    around = grad.as_strided((2, 5, 7, 9), (35 * 41, 7 * 41, 41, 1), grad.storage_offset() - 4)
    assert torch.isnan(around[..., :4]).all()  # nothing beside the view was written


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_the_result_is_channels_last(layout) -> None:
    values = make((2, 12, 20, 5, 7, 4))
    plain = run_by_us(4, list(values))(*values.values())
    others = dict(values)
    for name in ("grad", "x", "skip"):
        others[name] = values[name].contiguous(memory_format=layout)
    found = run_by_us(4, list(values))(*others.values())
    assert all(map(torch.equal, plain, found))
    assert all(value.is_contiguous(memory_format=CL) for value in found[:2])


def test_reads_nothing_beside_its_input() -> None:
    values = make((1, 13, 11, 5, 7, 4))
    plain = run_by_us(4, list(values))(*values.values())
    guarded = (amid_nans(value) for value in values.values())
    assert all(map(torch.equal, plain, run_by_us(4, list(values))(*guarded)))


def test_a_mean_of_a_thousand_beside_a_deviation_of_a_tenth() -> None:
    values = make((2, 32, 0, 16, 16, 8))
    values["x"] = values["x"] * 0.1 + 1000
    assert_as_accurate(run_by_us(8, list(values)), *values.values())


@pytest.mark.parametrize(
    "case", [(0, 12, 4, 5, 7, 4), (2, 12, 4, 0, 7, 4), (2, 0, 0, 5, 7, 4)], ids=str
)
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_to_do(in_place, case) -> None:
    values = make(case)
    names = [name for name in values if values[name] is not None]
    found = run_by_us(4, list(values), in_place=in_place)(*values.values())
    for name, value in zip([n for n in names if n != "grad"], found, strict=True):
        assert value.shape == values[name].shape
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("shape", [(5, 40, 24, 9, 9, 8), (1, 512, 0, 8, 8, 32)], ids=str)
def test_threads_do_not_change_the_bits(shape) -> None:
    values, threads, results = make(shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_by_us(shape[-1], list(values))(*values.values()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@settings(max_examples=40)
@given(
    n=st.integers(1, 3), groups=st.integers(1, 6), per_group=st.integers(1, 19),
    h=st.integers(1, 9), w=st.integers(1, 9), cut=st.floats(0, 1), silu=st.booleans(),
)  # fmt: skip
def test_any_shape(n, groups, per_group, h, w, cut, silu) -> None:
    channels = groups * per_group
    first = round(cut * channels)
    values = make((n, first, channels - first, h, w, groups), torch.float64, seed=h)
    found = run_by_us(groups, list(values), silu)(*values.values())
    wanted = by_autograd(groups, silu, values)
    if h * w * per_group == 1:  # the norm of one value is 0, and dividing by eps amplifies rounding
        return
    for name, value in zip(wanted, found, strict=True):
        size = 1 + wanted[name].abs().max() if wanted[name].numel() else 1
        assert ((value - wanted[name]).abs() <= 1e-7 * size).all(), name


def test_is_one_dispatcher_call() -> None:
    values = make((2, 8, 0, 4, 4, 4))
    statistics = [ops.channel_statistics(values["x"])]
    with CountCalls() as counted:
        ops.norm_backward(values["grad"], values["x"], statistics, 4, values["weight"])
    assert counted.names == ["fastdiff.norm_backward.default"]


def arguments(values, groups=4):
    statistics = [ops.channel_statistics(values[name]) for name in ("x", "skip")]
    return (
        values["grad"], values["x"], statistics, groups, values["weight"], values["bias"], 1e-5,
        values["scale"], values["shift"], True, values["skip"],
    )  # fmt: skip


def test_opcheck() -> None:
    given = arguments(make((2, 12, 20, 5, 7, 4)))
    torch.library.opcheck(torch.ops.fastdiff.norm_backward.default, given)
    torch.library.opcheck(torch.ops.fastdiff.norm_backward_in_place.default, given)


X = torch.randn(2, 6, 4, 4).contiguous(memory_format=CL)
S = ops.channel_statistics(X)
REFUSED = [
    ("vector", lambda: ops.norm_backward(X[0], X[0], [S], 3), ValueError, r"\[N, C, H, W\]"),
    ("integers", lambda: ops.norm_backward(X.long(), X.long(), [S], 3), TypeError, "int64"),
    ("grad", lambda: ops.norm_backward(X[:1], X, [S], 3), ValueError, r"grad must have shape"),
    ("grad of another dtype", lambda: ops.norm_backward(X.double(), X, [S], 3), TypeError,
     "float64"),
    ("skip", lambda: ops.norm_backward(X, X, [S], 3, skip=X[:, :, :2]), ValueError, "skip"),
    ("groups", lambda: ops.norm_backward(X, X, [S], 4), ValueError, "got 4 groups for 6"),
    ("negative groups", lambda: ops.norm_backward(X, X, [S], -1), ValueError, "got -1 groups"),
    ("eps", lambda: ops.norm_backward(X, X, [S], 3, eps=-1.0), ValueError, "got -1.0"),
    ("no statistics", lambda: ops.norm_backward(X, X, [], 3), ValueError, "of 6 channels, got 0"),
    ("statistics twice", lambda: ops.norm_backward(X, X, [S, S], 3), ValueError, "got 12"),
    ("statistics of one image", lambda: ops.norm_backward(X, X, [S[:1]], 3), ValueError,
     r"\[2, C, 2\], got \(1, 6, 2\)"),
    ("statistics in float32", lambda: ops.norm_backward(X, X, [S.float()], 3), TypeError,
     "must be float64"),
    ("weight", lambda: ops.norm_backward(X, X, [S], 3, torch.ones(5)), ValueError,
     r"weight must have shape \(6,\), got \(5,\)"),
    ("weight of another dtype", lambda: ops.norm_backward(X, X, [S], 3, torch.ones(6).half()),
     TypeError, "weight must be torch.float32"),
    ("scale", lambda: ops.norm_backward(X, X, [S], 3, scale=torch.ones(6)), ValueError,
     r"scale must have shape \(2, 6\), got \(6,\)"),
    ("silu alone with a weight", lambda: ops.norm_backward(X, X, [], 0, torch.ones(6)), ValueError,
     "nothing else"),
    ("nothing at all", lambda: ops.norm_backward(X, X, [], 0, silu=False), ValueError,
     "nothing else"),
    ("a gradient of it", lambda: ops.norm_backward(X, X, [S], 3, torch.ones(6, requires_grad=True)),
     RuntimeError, "no gradient"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


def test_what_cannot_be_written_in_place() -> None:
    with pytest.raises(ValueError, match="must be channels-last"):
        ops.norm_backward(torch.randn(X.shape), X, [S], 3, in_place=True)
    with pytest.raises(ValueError, match="share memory"):
        ops.norm_backward(X, X, [S], 3, in_place=True)


NONE = (None, None)
STRAIGHT = {
    "three dimensions": lambda op: op(X[0], X[0], [S], 3, *NONE, 1e-5, *NONE, True, None),
    "grad": lambda op: op(X[:, :5], X, [S], 3, *NONE, 1e-5, *NONE, True, None),
    "skip": lambda op: op(X, X, [S], 3, *NONE, 1e-5, *NONE, True, X[0]),
    "groups": lambda op: op(X, X, [S], 4, *NONE, 1e-5, *NONE, True, None),
    "negative groups": lambda op: op(X, X, [S], -3, *NONE, 1e-5, *NONE, True, None),
    "no statistics": lambda op: op(X, X, [], 3, *NONE, 1e-5, *NONE, True, None),
    "fewer statistics": lambda op: op(X, X, [S[:, :3]], 3, *NONE, 1e-5, *NONE, True, None),
    "statistics": lambda op: op(X, X, [S.float()], 3, *NONE, 1e-5, *NONE, True, None),
    "weight": lambda op: op(X, X, [S], 3, torch.ones(5), None, 1e-5, *NONE, True, None),
    "half": lambda op: op(X, X, [S], 3, torch.ones(6).half(), None, 1e-5, *NONE, True, None),
    "scale": lambda op: op(X, X, [S], 3, *NONE, 1e-5, torch.ones(3, 6), None, True, None),
    "shift": lambda op: op(X, X, [S], 3, *NONE, 1e-5, None, torch.ones(6), True, None),
    "no norm": lambda op: op(X, X, [S], 0, *NONE, 1e-5, *NONE, True, None),
    "nothing": lambda op: op(X, X, [], 0, *NONE, 1e-5, *NONE, False, None),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
@pytest.mark.parametrize("name", ["norm_backward", "norm_backward_in_place"])
def test_the_kernel_checks_for_itself(name, bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad(getattr(torch.ops.fastdiff, name))
