"""1x1 convolutions by Strassen's algorithm, and gated ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import amid_nans
from conv2d_cases import DTYPE_IDS, DTYPES, NO_PADDING, OPTIONS, Case, make
from conv2d_judging import call, judge, relative

from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, suits

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = {
    "lines": Case((2, 64, 9, 30), 70, (1, 1), padding=NO_PADDING),
    "small images": Case((17, 32, 3, 5), 200, (1, 1), padding=NO_PADDING),
    "few pixels": Case((1, 640, 2, 3), 330, (1, 1), padding=NO_PADDING),
    "deep": Case((1, 1600, 3, 67), 33, (1, 1), padding=NO_PADDING),
    "skip": Case((2, 40, 5, 7), 150, (1, 1), padding=NO_PADDING, skip=24),
}
every_case = pytest.mark.parametrize("case", HALVES.values(), ids=HALVES)


@pytest.mark.parametrize(("channels", "bound"), [(64, 4e-7), (1280, 1e-6), (5120, 1.2e-6)])
def test_accuracy_of_zero_means(channels, bound) -> None:
    """The bounds that csrc/cpu/kernels/strassen.h states."""
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 10, 20, generator=g)
    weight = torch.randn(96, channels, 1, 1, generator=g) / math.sqrt(channels)
    oracle = F.conv2d(x.double(), weight.double())
    assert relative(ops.conv2d(x, weight, algorithm="strassen")[0], oracle) < bound


@pytest.mark.parametrize("filters", ["of any sum", "that sum to nothing"])
def test_accuracy_of_means_of_100_deviations(filters) -> None:
    """Errors are relative to what is added up: with sums that cancel, to 100 times the result."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 10, 20, generator=g)
    mean = 100 * torch.randn(256, 1, 1, generator=g).sign()
    weight = torch.randn(96, 256, 1, 1, generator=g) / 16
    if filters == "that sum to nothing":
        weight -= (weight * mean).sum(1, keepdim=True) * mean / mean.square().sum()
    x += mean
    y, _ = ops.conv2d(x, weight, algorithm="strassen")
    oracle = F.conv2d(x.double(), weight.double())
    assert relative(y, oracle) < (1e-6 if filters == "of any sum" else 1e-4)


@every_case
def test_threads_do_not_change_the_bits(case) -> None:
    values = make(case, torch.float32, OPTIONS)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(ops.conv2d(**values, silu=True, statistics=True, algorithm="strassen"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_case
def test_an_image_does_not_depend_on_the_others(case) -> None:
    """To the bit, and where another one is not finite."""
    values = make(case, torch.float32, OPTIONS)
    whole, _ = ops.conv2d(**values, algorithm="strassen")
    last = {name: v if name in ("weight", "bias") else v[-1:] for name, v in values.items()}
    alone, _ = ops.conv2d(**last, algorithm="strassen")
    assert torch.equal(alone, whole[-1:])
    values["x"][:-1] = torch.nan
    assert torch.equal(ops.conv2d(**values, algorithm="strassen")[0][-1:], whole[-1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@every_case
def test_packed_weights_and_strides_do_not_change_the_bits(case, dtype) -> None:
    values = make(case, dtype, OPTIONS)
    y, _ = ops.conv2d(**values, algorithm="strassen")
    packed = ops.conv2d_pack(values["weight"].mT.contiguous().mT, "strassen")
    values["weight"] = torch.full_like(values["weight"], torch.nan)  # only its shape is read
    values["x"] = values["x"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.conv2d(**values, algorithm="strassen", packed=packed)[0], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@every_case
def test_reads_nothing_beside_its_inputs(case, dtype) -> None:
    values = make(case, dtype, OPTIONS)
    values["x"] = values["x"].contiguous(memory_format=torch.channels_last)
    packed = ops.conv2d_pack(values["weight"], "strassen")
    wanted, _ = ops.conv2d(**values, algorithm="strassen")
    around = {name: amid_nans(value) for name, value in values.items()}
    found, _ = ops.conv2d(**around, algorithm="strassen", packed=amid_nans(packed))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad) -> None:
    """In the pixel, and in the one that it is added to; no further."""
    values = make(HALVES["lines"], torch.float32, ())
    values["x"][1, 4, 5, 3] = bad
    y, _ = ops.conv2d(**values, algorithm="strassen")
    broken = ~torch.isfinite(y)
    assert broken[1, :, 5, 3].all()
    assert not broken[0].any()
    assert broken.any(1).sum() <= 2


# Gated.

GATED = {
    "rows": Case((2, 40, 9, 30), 256, (1, 1), padding=NO_PADDING),
    "halves": Case((2, 64, 9, 30), 768, (1, 1), padding=NO_PADDING),
    "halves, few pixels": Case((1, 320, 2, 3), 512, (1, 1), padding=NO_PADDING),
    "3x3": Case((2, 13, 5, 7), 256),
    "no images": Case((0, 32, 5, 7), 256, (1, 1), padding=NO_PADDING),
}
SUITED = [
    pytest.param(case, algorithm, dtype, id=f"{name}-{algorithm}-{DTYPE_IDS[DTYPES.index(dtype)]}")
    for name, case in GATED.items()
    for algorithm in ALGORITHMS
    for dtype in DTYPES
    if suits(algorithm, case.spec(gated=True), dtype)
]
OF_HALVES = [
    (algorithm, dtype)
    for algorithm in ALGORITHMS
    for dtype in DTYPES
    if suits(algorithm, GATED["halves"].spec(gated=True), dtype)
]


@pytest.mark.parametrize("options", [(), ("bias",), ("bias", "norm")], ids=["bare", "bias", "norm"])
@pytest.mark.parametrize(("case", "algorithm", "dtype"), SUITED)
def test_values_of_gated(case, algorithm, dtype, options) -> None:
    values = make(case, dtype, options)

    run = call(algorithm, list(values), gated=True, silu=bool(options), **case.settings())
    (y,) = run(*values.values())
    assert y.shape[1] == case.filters // 2
    judge(algorithm, run, *values.values())


@pytest.mark.parametrize(("algorithm", "dtype"), OF_HALVES)
def test_gated_is_the_gate_of_what_is_not(algorithm, dtype) -> None:
    """To the bit where nothing is rounded between, for any number of threads."""
    values = make(GATED["halves"], dtype, ("bias",))
    y, _ = ops.conv2d(**values, algorithm=algorithm)
    wanted = ops.geglu(y.movedim(1, -1)).movedim(-1, 1)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found, _ = ops.conv2d(**values, gated=True, algorithm=algorithm)
        if dtype == torch.float32:
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("algorithm", "dtype"), OF_HALVES)
def test_opcheck(algorithm, dtype, gated) -> None:
    case = GATED["halves"]
    values = make(case, dtype, ("bias", "norm"))
    number, weight = ALGORITHMS[algorithm].number, values["weight"]
    torch.library.opcheck(torch.ops.fastdiff.conv2d_pack.default, (weight, number))
    packed = ops.conv2d_pack(weight, algorithm)
    torch.library.opcheck(
        torch.ops.fastdiff.conv2d.default,
        (values["x"], packed, case.spec(silu=True, gated=gated).encode(), number, None,
         values["bias"], values["norm"]),
    )  # fmt: skip
