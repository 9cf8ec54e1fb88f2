"""channel_statistics and group_norm_coefficients: values, layouts, and what they must refuse."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, amid_nans
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("weight", "bias", "scale", "shift")

# Of x and of what is concatenated to it: N, C_i, spatial..., groups
CASES = {
    "one channel": (2, [1], (5, 7), 1),
    "three channels": (2, [3], (8, 8), 3),
    "one group": (3, [24], (6, 5), 1),
    "one channel a group": (2, [40], (9, 3), 40),
    "vector tails": (3, [12], (5, 7), 3),
    "one pixel": (2, [16], (1, 1), 4),
    "stable diffusion's 10 a group": (1, [320], (8, 8), 32),
    "many pixels": (1, [8], (67, 71), 2),
    "no images": (0, [12], (5, 7), 3),
    "17 images": (17, [12], (3, 3), 3),
    "a group across two tensors": (2, [10, 14], (6, 5), 4),
    "a group across three": (2, [1, 2, 9], (6, 5), 2),
    "nothing beside it": (2, [12, 0], (6, 5), 3),
    "signals": (2, [12], (33,), 3),
    "volumes": (2, [12], (3, 4, 5), 3),
    "no spatial dimensions": (4, [12], (), 3),
}

DATA = {
    "centred": lambda x: x,
    "mean 100 deviations": lambda x: x + 100,
    "drifting": lambda x: x * 0.1 + torch.linspace(-20, 20, x.shape[-2])[:, None],
    "outlier first": lambda x: x.index_put((torch.tensor(0),) * 4, torch.tensor(300.0)),
    "channels apart": lambda x: x + torch.linspace(-40, 40, x.shape[1])[:, None, None],
}


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def options_of(n, channels, names=OPTIONS):
    """Gain and offset of the norm, and ADM's scale and shift."""
    return {
        name: normal(*((channels,) if name in ("weight", "bias") else (n, channels)), seed=seed)
        for seed, name in enumerate(names)
    }


def assert_statistics(found: Tensor, x: Tensor) -> None:
    """Mean to 1e-6 deviations and variance to 1e-5, which no norm in float32 sees."""
    with fastdiff.backend("reference"):
        wanted = ops.channel_statistics(x.double())
    assert (found.dtype, found.shape) == (torch.float64, (*x.shape[:2], 2))
    (mean, variance), (true_mean, true_variance) = found.unbind(2), wanted.unbind(2)
    assert ((mean - true_mean).abs() <= 1e-6 * true_variance.sqrt() + 1e-15).all()
    assert ((variance - true_variance).abs() <= 1e-5 * true_variance + 1e-15).all()


def applied(coefficients: Tensor, x: Tensor) -> Tensor:
    """What conv2d makes of them, in float64."""
    shape = (*coefficients.shape[::2], *[1] * (x.ndim - 2))
    gain, offset = coefficients.double().unbind(1)
    return gain.view(shape) * x.double() + offset.view(shape)


def torch_norm(x, groups, eps=1e-5, weight=None, bias=None, scale=None, shift=None):
    """The norm as PyTorch computes it in float64."""

    def wide(value):
        return None if value is None else value.double()

    def beside(value):
        return value.double().view(*value.shape, *[1] * (x.ndim - 2))

    h = torch.group_norm(x.double().contiguous(), groups, wide(weight), wide(bias), eps)
    if scale is not None:
        h = h * (1 + beside(scale))
    return h if shift is None else h + beside(shift)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_statistics(case, dtype, layout) -> None:
    n, parts, spatial, _ = case
    x = normal(n, parts[0], *spatial).to(dtype)
    if len(spatial) == 2:
        x = x.contiguous(memory_format=layout)
    assert_statistics(ops.channel_statistics(x), x)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_statistics_of_ill_scaled_data(dtype, data) -> None:
    x = data(normal(2, 70, 24, 20)).to(dtype)
    assert_statistics(ops.channel_statistics(x), x)


def test_statistics_of_a_mean_of_ten_thousand_beside_a_deviation_of_a_tenth() -> None:
    x = normal(2, 16, 40, 40) * 0.1 + 1e4
    assert_statistics(ops.channel_statistics(x), x)


def test_statistics_of_a_constant() -> None:
    found = ops.channel_statistics(torch.full((2, 5, 31, 9), 0.1))
    assert torch.equal(found[..., 0], torch.full((2, 5), torch.tensor(0.1).item()).double())
    assert torch.equal(found[..., 1], torch.zeros(2, 5).double())


@pytest.mark.parametrize("shape", [(2, 5, 0, 4), (2, 0, 3, 3), (0, 5, 3, 3)], ids=str)
def test_statistics_of_nothing(shape) -> None:
    found = ops.channel_statistics(torch.empty(shape))
    assert found.shape == (*shape[:2], 2)
    assert torch.isnan(found).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("pixel", [(0, 0), (8, 3)], ids=["first", "later"])
def test_what_is_not_finite_stays_in_its_channel(pixel, bad) -> None:
    x = normal(2, 70, 20, 20)
    x[1, 66][pixel] = bad
    wanted = torch.ones(2, 70, 2, dtype=torch.bool)
    wanted[1, 66] = False
    assert torch.equal(torch.isfinite(ops.channel_statistics(x)), wanted)


@pytest.mark.parametrize("names", [(), OPTIONS], ids=["bare", "everything"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, names) -> None:
    """Of the concatenation, from statistics of its parts."""
    n, parts, spatial, groups = case
    tensors = [normal(n, c, *spatial, seed=c) for c in parts]
    x = torch.cat(tensors, dim=1)
    options = options_of(n, x.shape[1], names)
    found = ops.group_norm_coefficients([*map(ops.channel_statistics, tensors)], groups, **options)
    assert (found.dtype, found.shape) == (torch.float32, (n, 2, x.shape[1]))
    wanted = torch_norm(x, groups, **options)
    assert ((applied(found, x) - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_alone(name) -> None:
    x = normal(2, 12, 5, 7)
    options = options_of(2, 12, (name,))
    found = ops.group_norm_coefficients([ops.channel_statistics(x)], 4, eps=1e-3, **options)
    wanted = torch_norm(x, 4, 1e-3, **options)
    assert ((applied(found, x) - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_ill_scaled_data(data) -> None:
    """The error is that of rounding gain and offset to float32: relative to a x and b."""
    x = data(normal(2, 32, 24, 20))
    options = options_of(2, 32)
    found = ops.group_norm_coefficients([ops.channel_statistics(x)], 8, **options)
    sizes = applied(found.abs(), x.abs())
    assert ((applied(found, x) - torch_norm(x, 8, **options)).abs() <= 3e-6 * (1 + sizes)).all()


def test_the_kernel_is_the_reference_but_for_rounding() -> None:
    statistics = [normal(3, c, 2, seed=c).double().abs() for c in (5, 7)]
    options = options_of(3, 12)
    found = ops.group_norm_coefficients(statistics, 4, **options)
    with fastdiff.backend("reference"):
        wanted = ops.group_norm_coefficients(statistics, 4, **options)
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=2e-7)


def test_a_block_is_what_pytorch_computes_of_it() -> None:
    """conv(silu(norm(cat(x, skip)))), from statistics that a convolution took of x."""
    g = torch.Generator().manual_seed(0)
    before, skip = (torch.randn(2, c, 9, 8, generator=g) for c in (6, 10))
    first, second = (torch.randn(14, c, 3, 3, generator=g) / 9 for c in (6, 24))
    weight, bias = torch.randn(24, generator=g), torch.randn(24, generator=g)
    around = {"padding": (1, 1, 1, 1)}
    x, statistics = ops.conv2d(before, first, statistics=True, **around)
    norm = ops.group_norm_coefficients(
        [statistics, ops.channel_statistics(skip)], 8, weight, bias, 1e-6
    )
    y, _ = ops.conv2d(x, second, skip=skip, norm=norm, silu=True, **around)
    joined = torch.cat((F.conv2d(before.double(), first.double(), padding=1), skip), dim=1)
    h = F.silu(F.group_norm(joined, 8, weight.double(), bias.double(), 1e-6))
    torch.testing.assert_close(
        y.double(), F.conv2d(h, second.double(), padding=1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_options_of_any_dtype(dtype) -> None:
    statistics = [ops.channel_statistics(normal(2, 12, 5, 7))]
    options = {name: value.to(dtype) for name, value in options_of(2, 12).items()}
    found = ops.group_norm_coefficients(statistics, 4, **options)
    wide = {name: value.double() for name, value in options.items()}
    assert torch.equal(found, ops.group_norm_coefficients(statistics, 4, **wide))


# Layouts.

WIDE = normal(3, 12, 8, 10)
LAST = WIDE.contiguous(memory_format=torch.channels_last)
VIEWS = {
    "height and width swapped": LAST.mT,
    "images and channels swapped": WIDE.transpose(0, 1),
    "nhwc, sliced channels": LAST[:, 3:10],
    "nhwc, every other channel": LAST[:, ::2],
    "nhwc, without the first row": LAST[:, :, 1:],
    "nchw, every other column": WIDE[..., ::2],
    "one channel": LAST[:, 4:5],
    "one pixel": LAST[:, :, 3:4, 3:4],
    "one image repeated": LAST[:1].expand(3, -1, -1, -1),
    "one channel repeated": LAST[:, :1].expand(-1, 70, -1, -1),
    "one value repeated": LAST[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "rows as pixels": WIDE[0].mT,
}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_change_the_statistics(x) -> None:
    assert torch.equal(ops.channel_statistics(x), ops.channel_statistics(x.contiguous().clone()))


def test_strides_do_not_change_the_coefficients() -> None:
    whole = ops.channel_statistics(normal(2, 24, 5, 7))
    wide = normal(2, 36)
    tensors = {
        "weight": wide[0, ::3], "bias": wide[0, :1].expand(12), "scale": wide[:, 12:24],
        "shift": wide.mT[:12].mT,
    }  # fmt: skip
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    found = ops.group_norm_coefficients([whole[:, ::2]], 4, **tensors)
    assert torch.equal(found, ops.group_norm_coefficients([whole[:, ::2].contiguous()], 4, **plain))


def test_reads_nothing_beside_its_input() -> None:
    for layout in LAYOUTS:
        x = normal(1, 13, 5, 7).contiguous(memory_format=layout)
        assert torch.equal(ops.channel_statistics(amid_nans(x)), ops.channel_statistics(x))


@pytest.mark.parametrize("shape", [(1, 256, 40, 40), (17, 70, 9, 9)], ids=str)
def test_threads_do_not_change_the_bits(shape) -> None:
    x, results = normal(*shape), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(ops.channel_statistics(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_calls_from_several_threads_at_once() -> None:
    inputs = [normal(3, 70, 20, 20, seed=seed) for seed in range(12)]

    def run(x):
        return ops.group_norm_coefficients([ops.channel_statistics(x)], 7)

    wanted = list(map(run, inputs))
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, inputs), wanted))


def test_is_one_dispatcher_call() -> None:
    x, options = normal(2, 12, 5, 7), options_of(2, 12)
    with CountCalls() as counted:
        ops.group_norm_coefficients([ops.channel_statistics(x)], 4, **options)
    assert counted.names == [
        "fastdiff.channel_statistics.default", "fastdiff.group_norm_coefficients.default",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_opcheck(layout) -> None:
    x = normal(2, 12, 5, 7).contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.fastdiff.channel_statistics.default, (x,))
    statistics, options = ops.channel_statistics(x), options_of(2, 24)
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_coefficients.default,
        ([statistics, statistics], 8, options["weight"], options["bias"], 1e-5, options["scale"],
         options["shift"]),
    )  # fmt: skip


@settings(max_examples=60)
@given(
    n=st.integers(0, 3), groups=st.integers(1, 6), per_group=st.integers(1, 19),
    height=st.integers(1, 20), width=st.integers(1, 20), cut=st.floats(0, 1),
    mean=st.sampled_from([0.0, 30.0]), names=st.lists(st.sampled_from(OPTIONS), unique=True),
)  # fmt: skip
def test_any_shape(n, groups, per_group, height, width, cut, mean, names) -> None:
    channels = groups * per_group
    x = normal(n, channels, height, width, seed=height) + mean
    first = round(cut * channels)
    parts = x.split((first, channels - first), dim=1)
    options = options_of(n, channels, names)
    found = ops.group_norm_coefficients([*map(ops.channel_statistics, parts)], groups, **options)
    sizes = applied(found.abs(), x.abs())
    wanted = torch_norm(x, groups, **options)
    assert ((applied(found, x) - wanted).abs() <= 1e-5 * (1 + sizes)).all()


# Bad input.

S = torch.zeros(2, 6, 2, dtype=torch.float64)
META = torch.zeros(6, device="meta")
REFUSED = [
    ("statistics of integers", lambda: ops.channel_statistics(S.long()), TypeError,
     "x must be floating point"),
    ("statistics of a sparse tensor", lambda: ops.channel_statistics(S.to_sparse()), TypeError,
     "dense tensor"),
    ("statistics of a vector", lambda: ops.channel_statistics(S[0, 0]), ValueError,
     r"x must be \[N, C, ...\], got \(2,\)"),
    ("nothing", lambda: ops.group_norm_coefficients([], 2), ValueError, "at least one tensor"),
    ("float32", lambda: ops.group_norm_coefficients([S.float()], 2), TypeError,
     "statistics must be float64, got torch.float32"),
    ("two dimensions", lambda: ops.group_norm_coefficients([S[0]], 2), ValueError,
     r"statistics must have shape \[N, C, 2\], got \(6, 2\)"),
    ("four dimensions", lambda: ops.group_norm_coefficients([S[None]], 2), ValueError,
     r"\[N, C, 2\]"),
    ("three numbers", lambda: ops.group_norm_coefficients([torch.zeros(2, 6, 3).double()], 2),
     ValueError, r"\[N, C, 2\], got \(2, 6, 3\)"),
    ("another batch", lambda: ops.group_norm_coefficients([S, S[:1]], 2), ValueError,
     r"\[N, C, 2\], got \(1, 6, 2\)"),
    ("groups that do not divide", lambda: ops.group_norm_coefficients([S], 4), ValueError,
     "got 4 groups for 6 channels"),
    ("groups of a part", lambda: ops.group_norm_coefficients([S, S[:, :1]], 6), ValueError,
     "got 6 groups for 7 channels"),
    ("no groups", lambda: ops.group_norm_coefficients([S], 0), ValueError, "got 0 groups"),
    ("negative groups", lambda: ops.group_norm_coefficients([S], -2), ValueError, "got -2 groups"),
    ("half a group", lambda: ops.group_norm_coefficients([S], 0.5), ValueError, "got 0.5 groups"),
    ("negative eps", lambda: ops.group_norm_coefficients([S], 2, eps=-1.0), ValueError,
     "eps must not be negative, got -1.0"),
    ("eps of no value", lambda: ops.group_norm_coefficients([S], 2, eps=torch.nan), ValueError,
     "got nan"),
    ("weight", lambda: ops.group_norm_coefficients([S], 2, torch.ones(5)), ValueError,
     r"weight must have shape \(6,\), got \(5,\)"),
    ("bias", lambda: ops.group_norm_coefficients([S], 2, bias=torch.ones(1)), ValueError,
     r"bias must have shape \(6,\), got \(1,\)"),
    ("scale", lambda: ops.group_norm_coefficients([S], 2, scale=torch.ones(6)), ValueError,
     r"scale must have shape \(2, 6\), got \(6,\)"),
    ("shift", lambda: ops.group_norm_coefficients([S], 2, shift=torch.ones(1, 6)), ValueError,
     r"shift must have shape \(2, 6\), got \(1, 6\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


@pytest.mark.parametrize("name", OPTIONS)
def test_options_elsewhere(name) -> None:
    """Beside a meta tensor the dispatcher would have the fake answer, with memory never written."""
    value = META if name in ("weight", "bias") else META.expand(2, 6)
    with pytest.raises(ValueError, match=r"on (the device|cpu)"):
        ops.group_norm_coefficients([S], 2, **{name: value})


STRAIGHT = {
    "statistics of integers": lambda take, norm: take(S.long()),
    "statistics of a vector": lambda take, norm: take(S[0, 0]),
    "float32": lambda take, norm: norm([S.float()], 2, None, None, 1e-5, None, None),
    "one of float32": lambda take, norm: norm([S, S.float()], 2, None, None, 1e-5, None, None),
    "two dimensions": lambda take, norm: norm([S[0]], 2, None, None, 1e-5, None, None),
    "three numbers": lambda take, norm: norm([S.mT], 2, None, None, 1e-5, None, None),
    "another batch": lambda take, norm: norm([S, S[:1]], 2, None, None, 1e-5, None, None),
    "groups": lambda take, norm: norm([S], 4, None, None, 1e-5, None, None),
    "no groups": lambda take, norm: norm([S], 0, None, None, 1e-5, None, None),
    "negative groups": lambda take, norm: norm([S], -2, None, None, 1e-5, None, None),
    "eps": lambda take, norm: norm([S], 2, None, None, -1.0, None, None),
    "weight": lambda take, norm: norm([S], 2, torch.ones(5), None, 1e-5, None, None),
    "integer weight": lambda take, norm: norm([S], 2, torch.ones(6).int(), None, 1e-5, None, None),
    "bias": lambda take, norm: norm([S], 2, None, torch.ones(7), 1e-5, None, None),
    "scale": lambda take, norm: norm([S], 2, None, None, 1e-5, torch.ones(6), None),
    "shift": lambda take, norm: norm([S], 2, None, None, 1e-5, None, torch.ones(1, 6)),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad(torch.ops.fastdiff.channel_statistics, torch.ops.fastdiff.group_norm_coefficients)


# In a process of its own, since it might never return.
SCRIPT = """
import torch
from fastdiff import ops
print(ops.group_norm_coefficients([torch.zeros(3, 0, 2, dtype=torch.float64)], 2**62).shape)
"""


def test_many_groups_of_no_channels() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.stdout.strip() == "torch.Size([3, 2, 0])", done.stderr
