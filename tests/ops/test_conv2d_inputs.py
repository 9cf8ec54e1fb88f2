"""conv2d on tensors of any strides and dtype, what the compiler is told of it, and bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS, CountCalls, amid_nans
from conv2d_cases import AROUND, CASES, OPTIONS, TENSORS, every_1x1, every_3x3, make

import fastdiff
from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS = {
    "nchw": lambda wide, last: wide,
    "nhwc": lambda wide, last: last,
    "nhwc, sliced channels": lambda wide, last: last[:, 3:10],
    "nhwc, every other channel": lambda wide, last: last[:, ::2],
    "nhwc, one channel": lambda wide, last: last[:, 4:5],
    "nhwc, without the first row": lambda wide, last: last[:, :, 1:],
    "nhwc, without the last column": lambda wide, last: last[..., :-1],
    "nhwc, one row": lambda wide, last: last[:, 2:9, 3:4],
    "nhwc, one column": lambda wide, last: last[:, 2:9, :, 3:4],
    "nhwc, one pixel": lambda wide, last: last[:, 2:9, 3:4, 3:4],
    "nhwc, one image": lambda wide, last: last[1:2, 2:9],
    "nhwc, every other image": lambda wide, last: last[::2],
    "nchw, sliced": lambda wide, last: wide[:, ::2, 1:, ::3],
    "nchw, one channel": lambda wide, last: wide[:, 4:5],
    "height and width swapped": lambda wide, last: last.mT,
    "images and channels swapped": lambda wide, last: wide.transpose(0, 1),
    "one image repeated": lambda wide, last: last[:1].expand(3, -1, -1, -1),
    "one channel repeated": lambda wide, last: last[:, :1].expand(-1, 5, -1, -1),
    "one pixel repeated": lambda wide, last: last[..., :1, :1].expand(-1, -1, 4, 5),
    "one value repeated": lambda wide, last: last[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "windows that overlap": lambda wide, last: wide.as_strided((2, 7, 5, 4), (20, 1, 12, 3)),
    "rows as pixels": lambda wide, last: wide[0].mT.unsqueeze(3),
}


def strided(view, dtype):
    """x of these strides, and the other tensors of anything but the plain ones."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 12, 8, 10, generator=g).to(dtype)
    x = VIEWS[view](wide, wide.contiguous(memory_format=torch.channels_last))
    n, c = x.shape[:2]
    return {
        "x": x,
        "weight": torch.randn(2 * c, c, 3, 3, generator=g).to(dtype).transpose(0, 1),
        "bias": torch.randn(2 * c, generator=g).to(dtype)[::2],
        "skip": x,
        "norm": torch.randn(2, 2 * c, n, generator=g).permute(2, 0, 1),
        "emb": torch.randn(n, 3 * c, generator=g).to(dtype)[:, c : 2 * c],
        "residual": x,
    }


@pytest.mark.parametrize("view", VIEWS)
@every_3x3
def test_strides_do_not_change_the_bits(algorithm, dtype, view) -> None:
    tensors = strided(view, dtype)
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    found = ops.conv2d(**tensors, **AROUND, algorithm=algorithm)
    wanted = ops.conv2d(**plain, **AROUND, algorithm=algorithm)
    assert all(map(torch.equal, found, wanted))
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())


@pytest.mark.parametrize("view", VIEWS)
@every_1x1
def test_a_1x1_convolution_of_any_strides(algorithm, dtype, view) -> None:
    """Plain pixels are read where they are."""
    x = strided(view, dtype)["x"]
    weight = torch.randn(5, x.shape[1], 1, 1).to(dtype)
    y, _ = ops.conv2d(x, weight, algorithm=algorithm)
    assert torch.equal(y, ops.conv2d(x.contiguous().clone(), weight, algorithm=algorithm)[0])


def test_an_embedding_of_any_strides() -> None:
    tensors = strided("nhwc", torch.float32)
    emb = tensors["emb"]
    for view in (emb[:1].expand(3, -1), emb[:, :1].expand(-1, 12), emb.mT.contiguous().mT):
        tensors["emb"] = view
        y, _ = ops.conv2d(**tensors, padding=(1, 1, 1, 1))
        tensors["emb"] = view.contiguous().clone()
        assert torch.equal(y, ops.conv2d(**tensors, padding=(1, 1, 1, 1))[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@every_3x3
def test_reads_nothing_beside_its_inputs(algorithm, dtype, layout) -> None:
    """Vectors that reached beyond a tensor would show in the result."""
    values = make(CASES["skip that straddles vectors"], dtype, OPTIONS)
    for name in ("x", "skip", "residual"):
        values[name] = values[name].contiguous(memory_format=layout)
    packed = ops.conv2d_pack(values["weight"], algorithm)
    wanted = ops.conv2d(**values, **AROUND, algorithm=algorithm)
    around = {name: amid_nans(value) for name, value in values.items()}
    found = ops.conv2d(**around, **AROUND, algorithm=algorithm, packed=amid_nans(packed))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["f64", "f16"])
def test_other_dtypes_are_computed_by_the_reference(dtype) -> None:
    values = make(CASES["skip"], dtype, OPTIONS)
    with CountCalls() as counted:
        found = ops.conv2d(**values, **AROUND, algorithm="winograd4")
    assert not any(name.startswith("fastdiff") for name in counted.names)
    assert found[0].dtype == dtype
    with fastdiff.backend("reference"):
        wanted = ops.conv2d(**values, **AROUND)
    assert all(map(torch.equal, found, wanted))


def test_is_one_dispatcher_call() -> None:
    values = make(CASES["skip"], torch.float32, OPTIONS)
    packed = ops.conv2d_pack(values["weight"], "winograd2")
    with CountCalls() as counted:
        ops.conv2d(**values, **AROUND, algorithm="winograd2", packed=packed)
    assert counted.names == ["fastdiff.conv2d.default"]


# What the compiler is told.


@pytest.mark.parametrize("statistics", [False, True])
@every_3x3
def test_opcheck(algorithm, dtype, statistics) -> None:
    case = CASES["skip"]
    values = make(case, dtype, OPTIONS)
    packed = ops.conv2d_pack(values["weight"], algorithm)
    spec = case.spec(silu=True, statistics=statistics)
    torch.library.opcheck(
        torch.ops.fastdiff.conv2d.default,
        (values["x"], packed, spec.encode(), ALGORITHMS[algorithm].number,
         *(values[name] for name in TENSORS), 0.5),
    )  # fmt: skip


@every_3x3
def test_opcheck_of_packing(algorithm, dtype) -> None:
    for shape in ((5, 3, 3, 3), (16, 8, 3, 3)):
        torch.library.opcheck(
            torch.ops.fastdiff.conv2d_pack.default,
            (torch.randn(shape).to(dtype), ALGORITHMS[algorithm].number),
        )


@every_3x3
def test_compiles_without_a_graph_break(algorithm, dtype) -> None:
    values = make(CASES["skip"], dtype, OPTIONS)
    compiled = torch.compile(ops.conv2d, fullgraph=True, backend="eager")
    wanted = ops.conv2d(**values, **AROUND, algorithm=algorithm)
    found = compiled(**values, **AROUND, algorithm=algorithm)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fakes_have_the_strides_of_the_kernel(case) -> None:
    values = make(case, torch.float32, ())
    packed = ops.conv2d_pack(values["weight"], "direct")
    options = {**case.settings(), "statistics": True}
    real = ops.conv2d(**values, **options, packed=packed)
    with torch._subclasses.FakeTensorMode() as mode:
        values = {name: mode.from_tensor(value) for name, value in values.items()}
        fakes = ops.conv2d(**values, **options, packed=mode.from_tensor(packed))
    for fake, value in zip(fakes, real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (
            value.shape, value.stride(), value.dtype,
        )  # fmt: skip


# Bad input.

X, W = torch.zeros(2, 6, 4, 4), torch.zeros(5, 6, 3, 3)
NORM = torch.zeros(2, 2, 6)
GATED = torch.zeros(256, 6, 3, 3)
REFUSED = [
    ("integers", lambda: ops.conv2d(X.long(), W.long()), TypeError, "x must be floating point"),
    ("a sparse tensor", lambda: ops.conv2d(X.to_sparse(), W), TypeError, "dense tensor"),
    ("no batch", lambda: ops.conv2d(X[0], W), ValueError,
     r"\[N, C, H, W\] and \[K, C, R, S\], got \(6, 4, 4\)"),
    ("a weight of one filter", lambda: ops.conv2d(X, W[0]), ValueError, r"and \(6, 3, 3\)"),
    ("a weight for other channels", lambda: ops.conv2d(X, W[:, :4]), ValueError,
     "weight is for 4 channels, the input has 6"),
    ("a weight for x alone", lambda: ops.conv2d(X, W, skip=X), ValueError,
     "for 6 channels, the input has 12"),
    ("a weight of another dtype", lambda: ops.conv2d(X, W.bfloat16()), TypeError,
     "weight must have the dtype of x, torch.float32, got torch.bfloat16"),
    ("a weight elsewhere", lambda: ops.conv2d(X, W.to("meta")), ValueError,
     "weight must be on the device of x"),
    ("a skip of another size", lambda: ops.conv2d(X, W, skip=X[:, :, 1:]), ValueError,
     "skip must have the shape of x but for its channels"),
    ("a skip of another batch", lambda: ops.conv2d(X, W, skip=X[:1]), ValueError, "skip must"),
    ("a skip of three dimensions", lambda: ops.conv2d(X, W, skip=X[0]), ValueError, "skip must"),
    ("a skip of another dtype", lambda: ops.conv2d(X, W, skip=X.double()), TypeError,
     "skip must have the dtype of x"),
    ("an unknown algorithm", lambda: ops.conv2d(X, W, algorithm="fft"), ValueError,
     "unknown algorithm 'fft', wanted one of direct, winograd2, winograd4, strassen, phases4, "
     "split_bf16, direct_bf16, winograd2_bf16, phases_bf16"),
    ("winograd of 1x1", lambda: ops.conv2d(X, W[..., :1, :1], algorithm="winograd2"), ValueError,
     r"winograd2 is for 3x3 kernels and stride 1, got a weight of \(5, 6, 1, 1\)"),
    ("winograd of stride 2", lambda: ops.conv2d(X, W, stride=(2, 2), algorithm="winograd4"),
     ValueError, r"winograd4 .* got a weight of \(5, 6, 3, 3\), stride \(2, 2\)"),
    ("phases of an image as it is", lambda: ops.conv2d(X, W, algorithm="phases4"), ValueError,
     "phases4 is for 3x3 kernels, stride 1, upsampled images and even .* and upsample False"),
    ("phases of odd padding",
     lambda: ops.conv2d(X, W, padding=(1, 1, 0, 1), upsample=True, algorithm="phases4"),
     ValueError, r"phases4 is for .* got .* padding \(1, 1, 0, 1\) and upsample True"),
    ("strassen of 3x3", lambda: ops.conv2d(X, W, algorithm="strassen"), ValueError,
     r"strassen is for 1x1 kernels and channels in multiples of 32, got a weight of"),
    ("strassen of 6 channels", lambda: ops.conv2d(X, W[..., :1, :1], algorithm="strassen"),
     ValueError, r"strassen is for 1x1 kernels .* got a weight of \(5, 6, 1, 1\)"),
    ("gated, of 5 filters", lambda: ops.conv2d(X, W, gated=True), ValueError,
     r"direct gates filters in multiples of 256, got a weight of \(5, 6, 3, 3\)"),
    ("gated, by winograd", lambda: ops.conv2d(X, GATED, gated=True, algorithm="winograd2"),
     ValueError, "winograd2 computes nothing gated, got a weight of"),
    ("gated, with statistics", lambda: ops.conv2d(X, GATED, gated=True, statistics=True),
     ValueError, "a gated convolution has no emb, residual, scale or statistics"),
    ("gated, scaled", lambda: ops.conv2d(X, GATED, gated=True, scale=0.5), ValueError, "no emb"),
    ("gated, with an embedding", lambda: ops.conv2d(X, GATED, gated=True, emb=X[..., 0, 0]),
     ValueError, "no emb"),
    ("gated, with a residual", lambda: ops.conv2d(X, GATED, gated=True, residual=X), ValueError,
     "no emb"),
    ("no stride", lambda: ops.conv2d(X, W, stride=(1, 0)), ValueError,
     r"strides of 1 or more .* got \(1, 0\)"),
    ("one stride", lambda: ops.conv2d(X, W, stride=(1,)), ValueError, "two strides"),
    ("two paddings", lambda: ops.conv2d(X, W, padding=(1, 1)), ValueError, "four paddings"),
    ("negative padding", lambda: ops.conv2d(X, W, padding=(0, 0, -1, 1)), ValueError,
     "four paddings of 0 or more"),
    ("an image smaller than the kernel", lambda: ops.conv2d(X[..., :2], W), ValueError,
     r"images of \(4, 2\) are smaller than the kernel \[3, 3\]"),
    ("a bias of another length", lambda: ops.conv2d(X, W, X[0, :, 0, 0]), ValueError,
     r"bias must have shape \(5,\), got \(6,\)"),
    ("a bias of another dtype", lambda: ops.conv2d(X, W, torch.zeros(5).half()), TypeError,
     "bias must have the dtype"),
    ("an embedding of another batch", lambda: ops.conv2d(X, W, emb=torch.zeros(1, 5)), ValueError,
     r"emb must have shape \(2, 5\)"),
    ("a residual like x", lambda: ops.conv2d(X, W, residual=X), ValueError,
     r"residual must have shape \(2, 5, 2, 2\), got \(2, 6, 4, 4\)"),
    ("a norm of another shape", lambda: ops.conv2d(X, W, norm=NORM[:, :1]), ValueError,
     r"norm must be float32 \[2, 2, 6\], got torch.float32 \(2, 1, 6\)"),
    ("a norm without the skip", lambda: ops.conv2d(X, torch.zeros(5, 12, 3, 3), skip=X, norm=NORM),
     ValueError, r"norm must be float32 \[2, 2, 12\]"),
    ("a norm of x's dtype", lambda: ops.conv2d(X.half(), W.half(), norm=NORM.half()), ValueError,
     "norm must be float32 .* got torch.float16"),
]  # fmt: skip


def rows(table):
    return [pytest.param(*row[1:], id=row[0]) for row in table]


@pytest.mark.parametrize(("bad", "error", "message"), rows(REFUSED))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(backend, bad, error, message) -> None:
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        bad()


PACKED = ops.conv2d_pack(W, "direct")


def straight(
    x=X, packed=PACKED, algorithm="direct", size=(5, 6, 3, 3), stride=(1, 1),
    padding=(1, 1, 1, 1), upsample=0, gated=0, flags=(0,), **tensors,
):  # fmt: skip
    """The op itself, past the Python checks."""
    number = ALGORITHMS[algorithm].number if isinstance(algorithm, str) else algorithm
    spec = (*size, *stride, *padding, upsample, 0, gated, *flags)
    return torch.ops.fastdiff.conv2d(x, packed, spec, number, **tensors)


def gated(algorithm="direct", **options):
    packed = ops.conv2d_pack(GATED, algorithm)
    return straight(packed=packed, size=GATED.shape, algorithm=algorithm, gated=1, **options)


def phases(upsample=1, **options):
    packed = ops.conv2d_pack(W, "phases4")
    return straight(packed=packed, algorithm="phases4", upsample=upsample, **options)


def pack(weight, algorithm):
    return torch.ops.fastdiff.conv2d_pack(weight, algorithm)


STRAIGHT = {
    "three dimensions": lambda: straight(X[0]),
    "float64": lambda: straight(X.double()),
    "integers": lambda: straight(X.long()),
    "skip of three dimensions": lambda: straight(skip=X[0]),
    "skip of another size": lambda: straight(skip=X[..., :2], size=(5, 12, 3, 3)),
    "skip of another dtype": lambda: straight(skip=X.bfloat16(), size=(5, 12, 3, 3)),
    "packed, too short": lambda: straight(packed=PACKED[:-1]),
    "packed, too long": lambda: straight(packed=torch.zeros(PACKED.numel() + 1)),
    "packed, nothing": lambda: straight(packed=PACKED[:0]),
    "packed in bfloat16": lambda: straight(packed=PACKED.bfloat16()),
    "packed, of two dimensions": lambda: straight(packed=PACKED[None]),
    "packed, every other": lambda: straight(packed=PACKED.repeat_interleave(2)[::2]),
    "packed, repeated": lambda: straight(packed=PACKED[:1].expand(PACKED.shape)),
    "packed for another algorithm": lambda: straight(algorithm="winograd2"),
    "an unknown algorithm": lambda: straight(algorithm=len(ALGORITHMS)),
    "phases of an image as it is": lambda: phases(upsample=0),
    "phases of odd padding": lambda: phases(padding=(1, 2, 1, 1)),
    "phases of 1x1": lambda: straight(size=(5, 6, 1, 1), algorithm="phases4", upsample=1),
    "phases of stride 2": lambda: phases(stride=(2, 2)),
    "phases, packed for another": lambda: straight(algorithm="phases4", upsample=1),
    "a negative algorithm": lambda: straight(algorithm=-1),
    "winograd of 1x1": lambda: straight(size=(5, 6, 1, 1), algorithm="winograd2"),
    "strassen of 3x3": lambda: straight(algorithm="strassen"),
    "strassen of 6 channels": lambda: straight(size=(5, 6, 1, 1), algorithm="strassen"),
    "gated, of 5 filters": lambda: straight(gated=1),
    "gated, by winograd": lambda: gated(algorithm="winograd2"),
    "gated, with an embedding": lambda: gated(emb=torch.zeros(2, 256)),
    "gated, with a residual": lambda: gated(residual=torch.zeros(2, 256, 4, 4)),
    "winograd of stride 2": lambda: straight(stride=(1, 2), algorithm="winograd4"),
    "a weight of three sizes": lambda: straight(size=(5, 6, 3)),
    "other channels": lambda: straight(size=(5, 5, 3, 3)),
    "no channels": lambda: straight(X[:, :0], packed=PACKED[:0], size=(5, 0, 3, 3)),
    "no filters": lambda: straight(packed=PACKED[:0], size=(0, 6, 3, 3)),
    "no kernel": lambda: straight(packed=PACKED[:0], size=(5, 6, 0, 3)),
    "negative filters": lambda: straight(size=(-5, 6, 3, 3)),
    "a negative kernel": lambda: straight(size=(5, 6, -3, -3)),
    "no rows": lambda: straight(X[:, :, :0], padding=(2, 2, 1, 1)),
    "a kernel larger than the image": lambda: straight(X[..., :2], padding=(0, 0, 0, 0)),
    "no stride": lambda: straight(stride=(0, 1)),
    "a negative stride": lambda: straight(stride=(1, -1)),
    "three strides": lambda: straight(stride=(1, 1, 1)),
    "negative padding": lambda: straight(padding=(2, -1, 1, 1)),
    "two paddings": lambda: straight(padding=(1, 1)),
    "bias": lambda: straight(bias=torch.zeros(6)),
    "bias of another dtype": lambda: straight(bias=torch.zeros(5).half()),
    "norm": lambda: straight(norm=NORM[..., :5]),
    "norm of another batch": lambda: straight(norm=NORM[:1]),
    "norm in float64": lambda: straight(norm=NORM.double()),
    "emb": lambda: straight(emb=torch.zeros(2, 6)),
    "emb of pixels": lambda: straight(emb=torch.zeros(2, 5, 1, 1)),
    "residual": lambda: straight(residual=X),
    "residual of one image": lambda: straight(residual=torch.zeros(1, 5, 4, 4)),
    "meta residual": lambda: straight(residual=torch.zeros(2, 5, 4, 4, device="meta")),
    "no numbers": lambda: torch.ops.fastdiff.conv2d(X, PACKED, (), 0),
    "a number too few": lambda: straight(flags=()),
    "a number too many": lambda: straight(flags=(0, 0)),
    "statistics of 2": lambda: straight(flags=(2,)),
    "a negative flag": lambda: straight(upsample=-1),
    "a gate of 256": lambda: straight(gated=256),
    "stride 65": lambda: straight(stride=(1, 65)),
    "padding 65": lambda: straight(padding=(0, 0, 65, 0)),
    "a huge stride": lambda: straight(stride=(2**63 - 1, 1)),
    "a huge padding": lambda: straight(padding=(2**63 - 1, 1, 1, 1)),
    "a huge kernel": lambda: straight(size=(5, 6, 2**32, 2**32)),
    "huge filters": lambda: straight(size=(2**62, 6, 3, 3)),
    "huge channels": lambda: straight(size=(5, 2**62, 3, 3)),
    "packing, float64": lambda: pack(W.double(), 0),
    "packing, three dimensions": lambda: pack(W[0], 0),
    "packing, unknown": lambda: pack(W, len(ALGORITHMS)),
    "packing, negative": lambda: pack(W, -1),
    "packing, nothing": lambda: pack(W[:0], 0),
    "packing, strassen of 3x3": lambda: ops.conv2d_pack(W, "strassen"),
    "packing, strassen of 6 channels": lambda: ops.conv2d_pack(W[..., :1, :1], "strassen"),
    "packing, winograd of 1x3": lambda: ops.conv2d_pack(W[:, :, :1], "winograd4"),
}


@pytest.mark.parametrize("bad", STRAIGHT.values(), ids=STRAIGHT)
def test_the_kernel_checks_for_itself(bad) -> None:
    with pytest.raises((TypeError, ValueError)):
        bad()


def test_packing_for_an_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'fft', wanted one of direct"):
        ops.conv2d_pack(W, "fft")


# Sizes whose products do not fit 64 bits: a crash would take the test run with it, so a process of
# their own computes them.
HUGE = {
    "kernel": "op(ONE, ONE[0, 0, 0, :0], (1, 1, 2**32, 2**32, 1, 1, 2**32 - 1, 0, 2**32 - 1, 0, "
              "0, 0, 0, 0), 0)",
    "filters": "op(ONE.expand(1, 4, 1, 1), ONE[0, 0, 0, :0], (2**62, 4, 1, 1, 1, 1, *NONE), 0)",
    "paddings": "op(ONE, PACKED, (1, 1, 1, 1, 1, 1, 2**63 - 1, 2**63 - 1, 1, 1, 0, 0, 0, 0), 0)",
    "padding": "ops.conv2d(ONE, ONE, padding=(2**40, 0, 2**40, 0))",
    "padding beyond 64 bits": "ops.conv2d(ONE, ONE, padding=(2**64, 0, 2**64, 0))",
    "stride": "ops.conv2d(ONE, ONE, stride=(2**32 - 1,) * 2, padding=(2**32 - 1, 0) * 2)",
    "stride and kernel": "ops.conv2d(ONE, ONE.expand(1, 1, 2, 2), stride=(2**32 - 2,) * 2, "
                         "padding=(2**32 - 1, 0) * 2)",
}  # fmt: skip
SCRIPT = """
import torch
from fastdiff import ops
op, ONE, NONE = torch.ops.fastdiff.conv2d, torch.ones(1, 1, 1, 1), (0,) * 8
PACKED = ops.conv2d_pack(ONE, "direct")
for name, code in {huge}.items():
    try:
        print(name, "returned", eval(code), flush=True)
    except (MemoryError, RuntimeError, ValueError):
        print(name, "refused", flush=True)
"""


def test_huge_sizes_are_refused() -> None:
    script = SCRIPT.replace("{huge}", repr(HUGE))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"{name} refused" for name in HUGE], done.stderr
    assert done.returncode == 0
