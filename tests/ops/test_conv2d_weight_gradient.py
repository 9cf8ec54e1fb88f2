"""conv2d_weight_gradient: every algorithm's values, against float64 and PyTorch, and bad input."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import amid_nans, assert_as_accurate
from conv2d_cases import CASES, DTYPE_IDS, DTYPES, Case, make
from conv2d_judging import BOUNDS, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name, row in ALGORITHMS.items() if row.weight_gradient is not None]


def suits(algorithm, case, dtype) -> bool:
    refusal = conv2d_algorithms.weight_gradient_refusal
    return refusal(ALGORITHMS[algorithm], case.spec(), dtype) is None


def suited(cases):
    return [
        pytest.param(
            case, algorithm, dtype, id=f"{name}-{algorithm}-{DTYPE_IDS[DTYPES.index(dtype)]}"
        )
        for name, case in cases.items()
        for algorithm in NAMES
        for dtype in DTYPES
        if suits(algorithm, case, dtype)
    ]


SUITED = suited(CASES)
every_3x3 = pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        pytest.param(algorithm, dtype, id=f"{algorithm}-{DTYPE_IDS[DTYPES.index(dtype)]}")
        for algorithm in NAMES
        for dtype in DTYPES
        if suits(algorithm, CASES["skip"], dtype)
    ],
)


def inputs(case, dtype, options=("norm",), seed=0):
    """dy, x and the options' tensors."""
    values = make(case, dtype, options, seed)
    del values["weight"]
    g = torch.Generator().manual_seed(seed + 1)
    return {"dy": torch.randn(case.out(), generator=g).to(dtype), **values}


def call(algorithm, names, case, **options):
    """A function of the tensors that returns dw and the sums."""
    options |= case.settings()

    def run(*tensors):
        values = dict(zip(names, tensors, strict=True))
        if "norm" in values:  # of the oracle too, where the other tensors are float64
            values["norm"] = values["norm"].float()
        dy, x = values.pop("dy"), values.pop("x")
        dw, sums = ops.conv2d_weight_gradient(
            dy, x, case.kernel, algorithm=algorithm, **values, **options
        )
        assert dw.is_contiguous(memory_format=torch.channels_last)
        return [dw, sums]

    def plain(*tensors):
        values = dict(zip(names, tensors, strict=True))
        weight = values["x"].new_zeros(case.weight).requires_grad_()
        spec = case.spec(silu=options.get("silu", False))
        y, _ = ops.reference.conv2d(
            values["x"], weight, spec, skip=values.get("skip"), norm=values.get("norm")
        )
        return torch.autograd.grad(y, weight, values["dy"])[0]

    multiplied = ALGORITHMS[algorithm].packed_dtype
    if multiplied == torch.bfloat16 and (options.get("silu") or "norm" in names):
        run.rounded = plain  # as PyTorch's gradient is that of what it has rounded
    return run


def judge(algorithm, run, *tensors) -> None:
    """Hold to twice what float32 explains; of Winograd's tiles, dw to their bound.

    Products of bfloat16 are exact in float32, and dw is not rounded to bfloat16. But what is
    multiplied as bfloat16 after a norm or SiLU is rounded first: there dw is held to twice the
    error of PyTorch, which rounds that once or more, and dw.
    """
    terms = max(1, math.prod(tensors[0].shape) // max(1, tensors[0].shape[1]))
    if algorithm not in BOUNDS and not hasattr(run, "rounded"):
        return assert_as_accurate(run, *tensors, terms=terms, cancelling=True)
    with fastdiff.backend("reference"):
        wanted = run(*(value.double() for value in tensors))
    dw, sums = run(*tensors)
    assert (dw.dtype, sums.dtype) == (torch.float32, torch.float32)
    if hasattr(run, "rounded"):
        allowed = 2 * max((run.rounded(*tensors) - wanted[0]).norm(), 2**-9 * wanted[0].norm())
    else:
        allowed = BOUNDS[algorithm] * wanted[0].norm()
    assert (dw - wanted[0]).norm() <= allowed
    return assert_as_accurate(lambda *t: run(*t)[1:], *tensors, terms=terms, cancelling=True)


@pytest.mark.parametrize("everything", [False, True], ids=["bare", "norm and silu"])
@pytest.mark.parametrize(("case", "algorithm", "dtype"), SUITED)
def test_values(case, algorithm, dtype, everything) -> None:
    values = inputs(case, dtype, ("norm",) if everything else ())
    judge(algorithm, call(algorithm, list(values), case, silu=everything), *values.values())


@pytest.mark.parametrize(
    ("options", "silu"), [(("norm",), False), ((), True)], ids=["norm alone", "silu alone"]
)
@every_3x3
def test_what_the_input_is_read_through(algorithm, dtype, options, silu) -> None:
    case = CASES["skip that straddles vectors"]
    values = inputs(case, dtype, options)
    judge(algorithm, call(algorithm, list(values), case, silu=silu), *values.values())


CHANNELS = [*range(1, 18), *range(30, 35)]


@pytest.mark.parametrize("channels", CHANNELS)
@every_3x3
def test_every_tail(algorithm, dtype, channels) -> None:
    """Of vectors of channels and of bands of filters."""
    for case in (Case((1, channels, 5, 6), 7), Case((2, 5, 6, 5), channels)):
        values = inputs(case, dtype)
        judge(algorithm, call(algorithm, list(values), case), *values.values())


LARGE = {
    "chunks of channels and filters": Case((2, 131, 12, 13), 200),
    "many images": Case((37, 20, 4, 4), 33),
    "blocks": Case((3, 24, 40, 40), 70),
    "a weight that does not stay in the cache": Case((1, 350, 6, 6), 340),
    "strided chunks": Case((2, 131, 13, 12), 140, stride=(2, 2)),
    "gathered windows": Case((3, 7, 20, 21), 40, (5, 5), padding=(2, 2, 2, 2)),
    "an odd batch of small images": Case((5, 40, 7, 7), 40),
    "one wide image": Case((1, 40, 1, 1000), 33, (1, 1), padding=(0, 0, 0, 0)),
    "a kernel of many taps": Case((2, 70, 40, 36), 21, (33, 34), padding=(0, 0, 0, 0)),
    "a linear layer": Case((300, 200, 1, 1), 130, (1, 1), padding=(0, 0, 0, 0)),
}


@pytest.mark.parametrize(("case", "algorithm", "dtype"), suited(LARGE))
def test_large(case, algorithm, dtype) -> None:
    values = inputs(case, dtype)
    judge(algorithm, call(algorithm, list(values), case, silu=True), *values.values())


@pytest.mark.parametrize(("case", "algorithm", "dtype"), suited(LARGE))
def test_threads_do_not_change_the_bits(case, algorithm, dtype) -> None:
    values = inputs(case, dtype)
    run = call(algorithm, list(values), case, silu=True)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(run(*values.values()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_calls_from_several_threads_at_once() -> None:
    calls = [
        (call(algorithm, list(values), case, silu=True), values)
        for seed, case in enumerate([CASES["skip"], LARGE["blocks"], LARGE["many images"]])
        for algorithm in NAMES
        for dtype in DTYPES
        if suits(algorithm, case, dtype)
        for values in [inputs(case, dtype, seed=seed)]
    ]
    wanted = [run(*values.values()) for run, values in calls] * 3
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda one: one[0](*one[1].values()), calls * 3)
        for found, expected in zip(results, wanted, strict=True):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "algorithm", [name for name in NAMES if torch.float32 in ALGORITHMS[name].dtypes]
)
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["mean 0", "mean 1"])
def test_is_nearly_as_accurate_as_pytorch(algorithm, mean) -> None:
    """Twice its error, and where tiles are transformed 2e-5 more."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 16, 16, generator=g) + mean
    dy = torch.randn(4, 48, 16, 16, generator=g) + mean
    options = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    with fastdiff.backend("reference"):
        wanted, _ = ops.conv2d_weight_gradient(dy.double(), x.double(), **options)
        plain, _ = ops.conv2d_weight_gradient(dy, x, **options)
    found, _ = ops.conv2d_weight_gradient(dy, x, **options, algorithm=algorithm)
    extra = BOUNDS.get(algorithm, 0.0)
    assert relative(found, wanted) <= 2 * relative(plain, wanted) + extra


@every_3x3
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["dy", "x"])
def test_what_is_not_finite_shows(algorithm, dtype, bad, where) -> None:
    """In the filter's or the channel's part of dw, and in no other; in the sums of its image."""
    case = CASES["vector tails"]
    values = inputs(case, dtype, ())
    values[where][1, 4, 5, 3] = bad
    dw, sums = call(algorithm, list(values), case)(*values.values())
    broken = ~torch.isfinite(dw)
    of = broken if where == "dy" else broken.transpose(0, 1)
    assert of[4].all()
    assert of.sum() == of[4].numel()
    broken = ~torch.isfinite(sums)
    assert broken.sum() == (1 if where == "dy" else 0)
    assert where == "x" or broken[1, 4]


@every_3x3
def test_new_memory_does_not_show(algorithm, dtype) -> None:
    """PyTorch fills it with NaN."""
    values = inputs(LARGE["many images"], dtype)
    run = call(algorithm, list(values), LARGE["many images"])
    wanted = run(*values.values())
    torch.use_deterministic_algorithms(True)
    try:
        found = run(*values.values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, wanted))


@every_3x3
def test_reads_nothing_beside_its_inputs(algorithm, dtype) -> None:
    """Vectors that reached beyond a tensor would show in the result."""
    case = CASES["skip that straddles vectors"]
    values = inputs(case, dtype)
    last = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
            for k, v in values.items()}  # fmt: skip
    run = call(algorithm, list(values), case, silu=True)
    wanted = run(*last.values())
    assert all(map(torch.equal, run(*values.values()), wanted))
    assert all(map(torch.equal, run(*map(amid_nans, last.values())), wanted))


VIEWS = {
    "nchw": lambda wide, last: wide[:, :7],
    "nhwc, sliced channels": lambda wide, last: last[:, 3:10],
    "nhwc, every other channel": lambda wide, last: last[:, ::2],
    "nhwc, every other image": lambda wide, last: last[::2],
    "nhwc, without the last column": lambda wide, last: last[..., :-1],
    "height and width swapped": lambda wide, last: last.mT,
    "one image repeated": lambda wide, last: last[:1].expand(3, -1, -1, -1),
    "one value repeated": lambda wide, last: last[:1, :1, :1, :1].expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("view", VIEWS)
@every_3x3
def test_strides_do_not_change_the_bits(algorithm, dtype, view) -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 12, 8, 10, generator=g).to(dtype)
    x = VIEWS[view](wide, wide.contiguous(memory_format=torch.channels_last))
    options = {"kernel": (3, 3), "padding": (1, 1, 1, 1), "algorithm": algorithm}
    plain = x.contiguous().clone()
    found = ops.conv2d_weight_gradient(x, x, skip=x, **options)
    wanted = ops.conv2d_weight_gradient(plain, plain, skip=plain, **options)
    assert all(map(torch.equal, found, wanted))


@settings(max_examples=60)
@given(
    n=st.integers(0, 3), channels=st.integers(1, 20), skip=st.integers(0, 9),
    filters=st.integers(1, 20), size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.just((3, 3)) | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.just((1, 1)) | st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4), upsample=st.booleans(),
    algorithm=st.sampled_from(NAMES), dtype=st.sampled_from(DTYPES), silu=st.booleans(),
    norm=st.booleans(),
)  # fmt: skip
def test_any_shape(
    n, channels, skip, filters, size, kernel, stride, padding, upsample, algorithm, dtype, silu,
    norm,
) -> None:  # fmt: skip
    case = Case(
        (n, channels, *size), filters, kernel, stride, padding, skip=skip, upsample=upsample
    )
    assume(suits(algorithm, case, dtype))
    assume(min(case.out()[2:]) > 0)
    values = inputs(case, dtype, ("norm",) if norm else (), seed=channels)
    judge(algorithm, call(algorithm, list(values), case, silu=silu), *values.values())


def test_the_reference_is_the_gradient_of_conv2d() -> None:
    """Of the weight, and by the sums of a bias and an embedding."""
    case = Case((2, 5, 6, 7), 4, (3, 2), (2, 1), (1, 0, 2, 1), skip=3, upsample=True)
    values = {name: value.double() for name, value in make(case, torch.float32, ()).items()}
    values["emb"] = torch.randn(2, 4).double().requires_grad_()
    weight = values["weight"].requires_grad_()
    norm = torch.randn(2, 2, 8)
    with fastdiff.backend("reference"):
        y, _ = ops.reference.conv2d(
            values["x"], weight, case.spec(silu=True), skip=values["skip"], norm=norm,
            emb=values["emb"],
        )  # fmt: skip
        dy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, (weight, values["emb"]), dy)
        found = ops.conv2d_weight_gradient(
            dy, values["x"], case.kernel, **case.settings(), skip=values["skip"], norm=norm,
            silu=True,
        )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_images() -> None:
    for dtype in DTYPES:
        dw, sums = ops.conv2d_weight_gradient(
            torch.zeros(0, 4, 3, 3).to(dtype), torch.zeros(0, 5, 5, 5).to(dtype), (3, 3)
        )
        assert torch.equal(dw, torch.zeros(4, 5, 3, 3))
        assert sums.shape == (0, 4)


# What the compiler is told.


@every_3x3
def test_opcheck(algorithm, dtype) -> None:
    case = CASES["skip"]
    values = inputs(case, dtype)
    torch.library.opcheck(
        torch.ops.fastdiff.conv2d_weight_gradient.default,
        (values["dy"], values["x"], case.spec(silu=True).encode(), ALGORITHMS[algorithm].number,
         values["skip"], values["norm"]),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fakes_have_the_strides_of_the_kernel(case) -> None:
    values = inputs(case, torch.bfloat16)
    dy, x = values.pop("dy"), values.pop("x")
    options = {"kernel": case.kernel, **case.settings(), **values}
    real = ops.conv2d_weight_gradient(dy, x, **options)
    with torch._subclasses.FakeTensorMode() as mode:
        options |= {name: mode.from_tensor(value) for name, value in values.items()}
        dy, x = mode.from_tensor(dy), mode.from_tensor(x)
        fakes = ops.conv2d_weight_gradient(dy, x, **options)
    for fake, value in zip(fakes, real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (
            value.shape, value.stride(), value.dtype,
        )  # fmt: skip


# Bad input.

X, DY = torch.zeros(2, 6, 4, 4), torch.zeros(2, 5, 2, 2)


def python(dy=DY, x=X, kernel=(3, 3), **options):
    return ops.conv2d_weight_gradient(dy, x, kernel, **options)


REFUSED = {
    "integers": (lambda: python(x=X.long(), dy=DY.long()), TypeError, "x must be floating point"),
    "no batch": (lambda: python(x=X[0]), ValueError, r"got \(2, 5, 2, 2\), \(6, 4, 4\)"),
    "dy of three dimensions": (lambda: python(DY[0]), ValueError, r"got \(5, 2, 2\)"),
    "one side": (lambda: python(kernel=(3,)), ValueError, r"two sides, got .* \(3,\)"),
    "no side": (lambda: python(kernel=(3, 0)), ValueError, "1 or more each"),
    "no filters": (lambda: python(DY[:, :0]), ValueError, "1 or more each"),
    "no rows": (lambda: python(x=X[:, :, :0]), ValueError, "images may not be empty"),
    "dy of another size": (
        lambda: python(padding=(1, 1, 1, 1)), ValueError,
        r"dy must have shape \(2, 5, 4, 4\), got \(2, 5, 2, 2\)",
    ),
    "dy of another batch": (lambda: python(DY[:1]), ValueError, r"dy must have shape \(2, 5, 2"),
    "dy of another dtype": (lambda: python(DY.double()), TypeError, "dy must have the dtype of x"),
    "dy elsewhere": (lambda: python(DY.to("meta")), ValueError, "dy must be on the device of x"),
    "a small image": (lambda: python(x=X[..., :2]), ValueError, "smaller than the kernel"),
    "a skip of another size": (lambda: python(skip=X[..., :2]), ValueError, "skip must have"),
    "a norm of x alone": (
        lambda: python(skip=X, norm=torch.zeros(2, 2, 6)), ValueError,
        r"norm must be float32 \[2, 2, 12\]",
    ),
    "an unknown algorithm": (lambda: python(algorithm="fft"), ValueError, "unknown algorithm"),
    "no gradient": (
        lambda: python(algorithm="strassen"), ValueError,
        "strassen computes no gradient of a weight, got a weight of",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


def straight(
    dy=DY, x=X, size=(5, 6, 3, 3), stride=(1, 1), padding=(0, 0, 0, 0), flags=(0, 0, 0, 0),
    algorithm=ALGORITHMS["direct"].number, **tensors,
):  # fmt: skip
    """The op itself, past the Python checks."""
    spec = (*size, *stride, *padding, *flags)
    return torch.ops.fastdiff.conv2d_weight_gradient(dy, x, spec, algorithm, **tensors)


STRAIGHT = {
    "three dimensions": lambda: straight(x=X[0]),
    "float64": lambda: straight(DY.double(), X.double()),
    "integers": lambda: straight(DY.long(), X.long()),
    "dy of three dimensions": lambda: straight(DY[0]),
    "dy of another size": lambda: straight(DY[..., :1]),
    "dy larger": lambda: straight(torch.zeros(2, 5, 4, 4)),
    "dy of one image": lambda: straight(DY[:1]),
    "dy of other filters": lambda: straight(DY[:, :4]),
    "dy of another dtype": lambda: straight(DY.bfloat16()),
    "dy elsewhere": lambda: straight(DY.to("meta")),
    "skip of another size": lambda: straight(skip=X[..., :2], size=(5, 12, 3, 3)),
    "skip of another dtype": lambda: straight(skip=X.bfloat16(), size=(5, 12, 3, 3)),
    "other channels": lambda: straight(size=(5, 7, 3, 3)),
    "norm of other channels": lambda: straight(norm=torch.zeros(2, 2, 5)),
    "norm in float64": lambda: straight(norm=torch.zeros(2, 2, 6).double()),
    "a kernel larger than the image": lambda: straight(x=X[..., :2]),
    "gated": lambda: straight(flags=(0, 0, 1, 0)),
    "no stride": lambda: straight(stride=(0, 1)),
    "a huge padding": lambda: straight(padding=(2**63 - 1, 1, 1, 1)),
    "an unknown algorithm": lambda: straight(algorithm=len(ALGORITHMS)),
    "no gradient": lambda: straight(algorithm=ALGORITHMS["strassen"].number),
    "too few numbers": lambda: straight(flags=(0,)),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_python_and_the_operator_refuse_the_same(name) -> None:
    """With the same sentence, before anything is computed."""
    row = ALGORITHMS[name]
    for case in CASES.values():
        if case.x[0] == 0:
            continue
        dtype = torch.float32 if torch.float32 in row.dtypes else torch.bfloat16
        reason = conv2d_algorithms.weight_gradient_refusal(row, case.spec(), dtype)
        values = inputs(case, dtype, ())
        numbers = (case.spec().encode(), row.number)
        tensors = (values["dy"], values["x"], *numbers, values.get("skip"))
        if reason is None:
            torch.ops.fastdiff.conv2d_weight_gradient(*tensors)
            continue
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}, got the convolution"):
            torch.ops.fastdiff.conv2d_weight_gradient(*tensors)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        python(DY.clone().requires_grad_())
