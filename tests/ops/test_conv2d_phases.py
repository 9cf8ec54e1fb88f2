"""3x3 convolutions of upsampled images as four of the images themselves."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import amid_nans
from conv2d_cases import DTYPES, OPTIONS, TENSORS, Case, make

import fastdiff
from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, suits

pytestmark = pytest.mark.usefixtures("one_thread")

UPSAMPLED = {
    "blocks": Case((2, 24, 20, 21), 70, upsample=True),
    "filters": Case((1, 96, 4, 5), 200, upsample=True),
    "17 images": Case((17, 24, 4, 3), 70, upsample=True),
    "a skip": Case((2, 13, 5, 6), 9, skip=7, upsample=True),
    "wide padding": Case((2, 9, 5, 4), 6, padding=(0, 2, 3, 1), upsample=True),
}
PHASES = [
    (name, dtype)
    for name in ALGORITHMS
    for dtype in DTYPES
    if "phases" in name and suits(name, UPSAMPLED["blocks"].spec(), dtype)
]
every_row = pytest.mark.parametrize(
    ("algorithm", "dtype"), PHASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in PHASES]
)
every_case = pytest.mark.parametrize("case", UPSAMPLED.values(), ids=UPSAMPLED)


def phases(case, values, algorithm, **options):
    return ops.conv2d(
        **values, **case.settings(), silu=True, statistics=True, algorithm=algorithm, **options
    )


@pytest.mark.parametrize("channels", [16, 256, 512])
def test_accuracy_of_zero_means(channels) -> None:
    """The bound that csrc/cpu/kernels/conv2d_winograd.h states."""
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 20, 20, generator=g)
    weight = torch.randn(24, channels, 3, 3, generator=g) / math.sqrt(9 * channels)
    options = {"padding": (1, 1, 1, 1), "upsample": True}
    with fastdiff.backend("reference"):
        oracle, _ = ops.conv2d(x.double(), weight.double(), **options)
    y, _ = ops.conv2d(x, weight, algorithm="phases4", **options)
    assert (y - oracle).norm() < 3e-6 * oracle.norm()


@every_row
@every_case
def test_threads_do_not_change_the_bits(case, algorithm, dtype) -> None:
    values = make(case, dtype, OPTIONS)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(phases(case, values, algorithm))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_row
@every_case
def test_packed_weights_and_strides_do_not_change_the_bits(case, algorithm, dtype) -> None:
    values = make(case, dtype, OPTIONS)
    wanted = phases(case, values, algorithm)
    packed = ops.conv2d_pack(values["weight"].mT.contiguous().mT, algorithm)
    values["weight"] = torch.full_like(values["weight"], torch.nan)  # only its shape is read
    values["x"] = values["x"].mT.contiguous().mT
    assert all(map(torch.equal, phases(case, values, algorithm, packed=packed), wanted))


@every_row
@every_case
def test_reads_nothing_beside_its_inputs(case, algorithm, dtype) -> None:
    values = make(case, dtype, OPTIONS)
    for name in {"x", "skip", "residual"} & set(values):
        values[name] = values[name].contiguous(memory_format=torch.channels_last)
    packed = ops.conv2d_pack(values["weight"], algorithm)
    wanted = phases(case, values, algorithm)
    around = {name: amid_nans(value) for name, value in values.items()}
    found = phases(case, around, algorithm, packed=amid_nans(packed))
    assert all(map(torch.equal, found, wanted))


@every_row
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(algorithm, dtype, statistics) -> None:
    case = UPSAMPLED["a skip"]
    values = make(case, dtype, OPTIONS)
    weight = values["weight"]
    number = ALGORITHMS[algorithm].number
    torch.library.opcheck(torch.ops.fastdiff.conv2d_pack.default, (weight, number))
    packed = ops.conv2d_pack(weight, algorithm)
    spec = case.spec(silu=True, statistics=statistics)
    torch.library.opcheck(
        torch.ops.fastdiff.conv2d.default,
        (values["x"], packed, spec.encode(), number, *(values[name] for name in TENSORS), 0.5),
    )
