"""conv2d: every algorithm's values, their accuracy, and the statistics that it takes."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conv2d_cases import (
    ANY_OF_3X3,
    AROUND,
    CASES,
    DTYPE_IDS,
    DTYPES,
    OF_3X3,
    OPTIONS,
    Case,
    every_3x3,
    make,
    needs,
)
from conv2d_judging import BOUNDS, call, judge, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS

pytestmark = pytest.mark.usefixtures("one_thread")

SUITED = [
    pytest.param(case, algorithm, dtype, id=f"{name}-{algorithm}-{DTYPE_IDS[DTYPES.index(dtype)]}")
    for name, case in CASES.items()
    for algorithm in ALGORITHMS
    for dtype in DTYPES
    if case.suits(algorithm, dtype)
]


@pytest.mark.parametrize("everything", [False, True], ids=["bare", "everything"])
@pytest.mark.parametrize(("case", "algorithm", "dtype"), SUITED)
def test_values(case, algorithm, dtype, everything) -> None:
    values = make(case, dtype, OPTIONS if everything else ())
    options = {"silu": True, "scale": 0.7, "statistics": True} if everything else {}
    run = call(algorithm, list(values), **case.settings(), **options)
    judge(algorithm, run, *values.values())


ALONE = {
    **{name: ((name,), {}) for name in OPTIONS},
    "silu": ((), {"silu": True}),
    "norm and silu": (("norm",), {"silu": True}),
    "scale": ((), {"scale": -1.5}),
    "scale of nothing": ((), {"scale": 0.0}),
    "statistics": (OPTIONS, {"statistics": True}),
}


@pytest.mark.parametrize(("tensors", "options"), ALONE.values(), ids=ALONE)
@every_3x3
def test_each_option_alone(algorithm, dtype, tensors, options) -> None:
    values = make(CASES["skip that straddles vectors"], dtype, tensors)
    run = call(algorithm, list(values), padding=(1, 1, 1, 1), **options)
    judge(algorithm, run, *values.values())


@every_3x3
def test_a_packed_weight_gives_the_same_bits(algorithm, dtype) -> None:
    values = make(CASES["many filters"], dtype, OPTIONS)
    packed = ops.conv2d_pack(values["weight"], algorithm)
    assert (packed.dtype, packed.ndim) == (ALGORITHMS[algorithm].packed_dtype, 1)
    y, _ = ops.conv2d(**values, **AROUND, algorithm=algorithm)
    values["weight"] = torch.full_like(values["weight"], torch.nan)  # only its shape is read
    again, _ = ops.conv2d(**values, **AROUND, algorithm=algorithm, packed=packed)
    assert torch.equal(again, y)


@pytest.mark.parametrize("algorithm", OF_3X3)
def test_a_weight_of_any_strides(algorithm) -> None:
    wide = torch.randn(22, 3, 5, 4)
    view = wide[::2, :, :, :3].permute(0, 2, 1, 3)
    packed = ops.conv2d_pack(view.contiguous(), algorithm)
    assert torch.equal(ops.conv2d_pack(view, algorithm), packed)


# The bounds that csrc/cpu/kernels/conv2d_winograd.h states.


@pytest.mark.parametrize("data", ["plain", "through a norm"])
@pytest.mark.parametrize("channels", [16, 128, 512])
def test_accuracy_of_zero_means(channels, data) -> None:
    """The norm's gains spread over a factor of 50, as those of trained networks do."""
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 20, 20, generator=g)
    weight = torch.randn(24, channels, 3, 3, generator=g) / math.sqrt(9 * channels)
    options = {"padding": (1, 1, 1, 1), "norm": None, "silu": data != "plain"}
    if data != "plain":
        gain = torch.randn(1, channels, generator=g).exp()
        options["norm"] = torch.stack((gain, torch.randn(1, channels, generator=g)), dim=1)
    with fastdiff.backend("reference"):
        oracle, _ = ops.conv2d(x.double(), weight.double(), **options)
    error = {
        algorithm: relative(ops.conv2d(x, weight, algorithm=algorithm, **options)[0], oracle)
        for algorithm in OF_3X3
    }
    assert error["direct"] < of_sums(9 * channels)
    assert error["winograd2"] < 2 * of_sums(channels)
    assert all(error[name] < bound for name, bound in BOUNDS.items() if name in error)


OF_SILU = [name for name, _ in ANY_OF_3X3 if needs(name)]


@pytest.mark.parametrize("data", ["plain", "through a norm"])
@pytest.mark.parametrize("mean", [0, 3])
@pytest.mark.parametrize("channels", [16, 128, 512])
@pytest.mark.parametrize("algorithm", OF_SILU)
def test_products_after_silu_round_less_than_twice_as_much_as_pytorch(
    algorithm, channels, mean, data
) -> None:
    """As csrc/cpu/kernels/bf16/conv2d_winograd.cpp states, of the data of the tests above."""
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 20, 20, generator=g)
    x += mean * torch.randn(channels, 1, 1, generator=g)
    weight = torch.randn(24, channels, 3, 3, generator=g) / math.sqrt(9 * channels)
    x, weight = x.bfloat16(), weight.bfloat16()
    options = {"padding": (1, 1, 1, 1), "norm": None, "silu": True}
    if data != "plain":
        gain = torch.randn(1, channels, generator=g).exp()
        options["norm"] = torch.stack((gain, torch.randn(1, channels, generator=g)), dim=1)
    with fastdiff.backend("reference"):
        plain, _ = ops.conv2d(x, weight, **options)
        wanted, _ = ops.conv2d(x.double(), weight.double(), **options)
    y, _ = ops.conv2d(x, weight, algorithm=algorithm, **options)
    bound = 1.95 if data == "plain" else 1.6
    assert relative(y, wanted) < bound * relative(plain, wanted)


def of_sums(terms) -> float:
    """Relative error of float32 sums of terms that have a mean of zero.

    A rounding is 2^-24 at most; the k-th addition rounds a sum of sqrt(k) terms' size, which makes
    sqrt(terms / 6) roundings of the result; after 384 terms the kernel begins another sum.
    """
    return 2**-24 * (1 + math.sqrt(min(terms, 384) / 6))


@pytest.mark.parametrize("taps", ["of any sum", "that sum to nothing"])
@pytest.mark.parametrize("algorithm", OF_3X3)
def test_accuracy_of_means_of_100_deviations(algorithm, taps) -> None:
    """Errors are relative to what is added up: with taps that cancel, to 100 times the result."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 20, 20, generator=g)
    x += 100 * torch.randn(128, 1, 1, generator=g).sign()
    weight = torch.randn(24, 128, 3, 3, generator=g) / math.sqrt(9 * 128)
    if taps == "that sum to nothing":
        weight -= weight.mean((2, 3), keepdim=True)
    oracle = F.conv2d(x.double(), weight.double())
    y, _ = ops.conv2d(x, weight, algorithm=algorithm)
    coarse = 5 if algorithm == "split_bf16" else 1  # its values keep 16 bits of 24
    assert relative(y, oracle) < coarse * (2e-6 if taps == "of any sum" else 1e-4)


@pytest.mark.parametrize("mean", [0.0, 100.0], ids=["mean 0", "mean 100"])
@pytest.mark.parametrize(("case", "algorithm", "dtype"), SUITED)
def test_statistics_of_what_was_written(case, algorithm, dtype, mean) -> None:
    """However large the mean is."""
    values = make(case, dtype, ("norm", "residual"))
    values["bias"] = torch.full((case.filters,), mean, dtype=dtype)
    options = {**case.settings(), **needs(algorithm), "statistics": True}
    y, found = ops.conv2d(**values, **options, algorithm=algorithm)
    assert (found.dtype, found.shape) == (torch.float64, (case.x[0], case.filters, 2))
    with fastdiff.backend("reference"):
        wanted = ops.channel_statistics(y.double())
    (mean, variance), (true_mean, true_variance) = found.unbind(2), wanted.unbind(2)
    assert ((mean - true_mean).abs() <= 2e-6 * true_variance.sqrt() + 1e-7 * true_mean.abs()).all()
    assert ((variance - true_variance).abs() <= 1e-5 * true_variance + 1e-12).all()


@pytest.mark.parametrize("algorithm", OF_3X3)
def test_statistics_beside_an_outlier(algorithm) -> None:
    """In the first pixel, as padding makes corners: what other values are taken relative to."""
    x = torch.randn(2, 20, 37, 29, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 30
    weight = torch.zeros(20, 20, 3, 3)
    weight[range(20), range(20), 1, 1] = 1
    y, found = ops.conv2d(x, weight, padding=(1, 1, 1, 1), statistics=True, algorithm=algorithm)
    with fastdiff.backend("reference"):
        wanted = ops.channel_statistics(y.double())
    assert ((found - wanted)[..., 0].abs() <= 2e-6 * wanted[..., 1].sqrt()).all()
    assert ((found - wanted)[..., 1].abs() <= 1e-5 * wanted[..., 1]).all()


def test_statistics_of_a_constant() -> None:
    x, weight = torch.ones(2, 3, 9, 9), torch.ones(5, 3, 1, 1)
    _, found = ops.conv2d(x, weight, torch.arange(5.0) * 1e5, statistics=True)
    assert torch.equal(found[..., 0], (3 + torch.arange(5.0) * 1e5).double().expand(2, 5))
    assert torch.equal(found[..., 1], torch.zeros(2, 5).double())


@every_3x3
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(algorithm, dtype, bad) -> None:
    """In its image, and in the statistics; it may spread over a Winograd tile, but no further."""
    values = make(CASES["vector tails"], dtype, ())
    values["x"][1, 4, 5, 3] = bad
    options = {**AROUND, "silu": False, **needs(algorithm)}
    y, found = ops.conv2d(**values, **options, algorithm=algorithm)
    broken = ~torch.isfinite(y)
    assert broken[1, :, 4:7, 2:5].all()
    assert not broken[[0, 2]].any()
    assert not broken[1, :, 8:].any()
    assert torch.equal(~torch.isfinite(found), broken.flatten(2).any(2)[..., None].expand(3, 19, 2))


def test_activations_at_the_ends_of_the_range() -> None:
    """Below -87 the sigmoid stops at 2^-127."""
    x = torch.tensor([-1e30, -200.0, -88.5, -87.0, -1e-30, 0.0, 1e-30, 87.0, 200.0, 3e38])
    y, _ = ops.conv2d(x.view(10, 1, 1, 1), torch.ones(1, 1, 1, 1), silu=True)
    torch.testing.assert_close(y.flatten(), F.silu(x), rtol=3e-7, atol=1e-8)
    assert torch.isnan(ops.conv2d(x[:1].view(1, 1, 1, 1) * torch.nan, torch.ones(1, 1, 1, 1))[0])


def test_a_weight_that_does_not_stay_in_the_cache() -> None:
    """Blocks are larger then."""
    values = make(Case((1, 350, 28, 32), 340), torch.float32, ("residual",))
    judge("winograd4", call("winograd4", list(values), padding=(1, 1, 1, 1)), *values.values())


# Threads.

SHARED = {
    "blocks": Case((2, 24, 40, 40), 70),  # threads take blocks
    "filters": Case((1, 96, 9, 10), 200),  # or, of a few blocks, filters
    "17 images": Case((17, 24, 7, 5), 70),
    "a large weight": Case((1, 700, 6, 6), 700),
}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
@every_3x3
def test_threads_do_not_change_the_bits(algorithm, dtype, case) -> None:
    values = make(case, dtype, OPTIONS)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(ops.conv2d(**values, **AROUND, algorithm=algorithm))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_calls_from_several_threads_at_once() -> None:
    calls = [
        (make(case, dtype, OPTIONS, seed), algorithm)
        for seed, case in enumerate([CASES["skip"], SHARED["blocks"], SHARED["filters"]])
        for algorithm, dtype in ANY_OF_3X3
    ]

    def run(call):
        values, algorithm = call
        return ops.conv2d(**values, **AROUND, algorithm=algorithm)

    wanted = list(map(run, calls)) * 3
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(run, calls * 3), wanted, strict=True):
            assert all(map(torch.equal, found, expected))


@settings(max_examples=60)
@given(
    n=st.integers(0, 3), channels=st.integers(1, 20), skip=st.integers(0, 9),
    filters=st.integers(1, 20), size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.just((3, 3)) | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.just((1, 1)) | st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4), upsample=st.booleans(),
    row=st.sampled_from(ANY_OF_3X3), silu=st.booleans(),
    options=st.lists(st.sampled_from(OPTIONS), unique=True),
)  # fmt: skip
def test_any_shape(
    n, channels, skip, filters, size, kernel, stride, padding, upsample, row, silu, options,
) -> None:  # fmt: skip
    algorithm, dtype = row
    case = Case(
        (n, channels, *size), filters, kernel, stride, padding, skip=skip, upsample=upsample
    )
    assume(case.suits(algorithm))
    assume(min(case.out()[2:]) > 0)
    values = make(case, dtype, options, seed=channels)
    run = call(algorithm, list(values), silu=silu, **case.settings())
    judge(algorithm, run, *values.values())


def test_packing_in_and_outside_inference_mode() -> None:
    """Memory that one call keeps for the next belongs to neither mode."""
    weight = torch.randn(9, 8, 3, 3).bfloat16()
    with torch.inference_mode():
        packed = ops.conv2d_pack(weight, "direct")
    assert torch.equal(ops.conv2d_pack(weight, "direct"), packed)
