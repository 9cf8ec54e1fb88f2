"""The list of convolution algorithms, of which C++ has the only copy, and specs of convolutions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conv2d_cases import CASES, DTYPES, OPTIONS, make
from conv2d_judging import call, judge

import fastdiff
from fastdiff import ops
from fastdiff.ops import conv2d_algorithms
from fastdiff.ops.backend import isa
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, computable, refusal, suits, within_limits
from fastdiff.ops.conv2d_spec import ConvSpec

pytestmark = pytest.mark.usefixtures("one_thread")
OF_1X1 = ConvSpec(256, 32)
OF_3X3 = ConvSpec(256, 32, (3, 3), padding=(1, 1, 1, 1))
SPECS = {
    "1x1": OF_1X1,
    "1x1 of 33 channels": ConvSpec(256, 33),
    "3x3": OF_3X3,
    "3x3, stride 2": replace(OF_3X3, stride=(2, 2)),
    "3x3, upsampled": replace(OF_3X3, upsample=True),
    "3x3, upsampled, padded oddly": replace(OF_3X3, upsample=True, padding=(1, 0, 1, 1)),
    "3x3 after SiLU": replace(OF_3X3, silu=True),
    "5x5": replace(OF_3X3, kernel=(5, 5)),
    "gated": replace(OF_1X1, gated=True),
    "gated, of 192 filters": replace(OF_1X1, gated=True, filters=192),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_computes_what_it_suits(name) -> None:
    """Whatever rows the list has: some case suits each of them."""
    algorithm = ALGORITHMS[name]
    case = next((case for case in CASES.values() if case.suits(name) and min(case.x) > 1), None)
    if case is None:
        with pytest.raises(ValueError, match=f"{name} (needs A|is for .* by dot products)"):
            ops.conv2d_pack(torch.zeros(8, 8, 3, 3), name)
        return
    for dtype in algorithm.dtypes:
        values = make(case, dtype, OPTIONS)
        run = call(name, list(values), **case.settings(), silu=True, statistics=True)
        judge(name, run, *values.values())
        packed = ops.conv2d_pack(values["weight"], name)
        assert packed.dtype == algorithm.packed_dtype
        assert packed.nbytes == conv2d_algorithms.packed_bytes(name, case.weight)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_python_and_the_operator_refuse_the_same(name, spec) -> None:
    """With the same sentence, before anything is computed."""
    algorithm = ALGORITHMS[name]
    dtype = torch.float32 if torch.float32 in algorithm.dtypes else torch.bfloat16
    x, weight = torch.randn(1, spec.channels, 4, 4).to(dtype), torch.randn(spec.weight).to(dtype)
    options = {"stride": spec.stride, "padding": spec.padding, "upsample": spec.upsample}
    options |= {"gated": spec.gated, "silu": spec.silu, "algorithm": name}
    reason = refusal(algorithm, spec, dtype)
    assert suits(name, spec, dtype) == (reason is None)
    if reason is None:
        ops.conv2d(x, weight, **options)
        return
    packed = ops.conv2d_pack(weight, "direct")
    with pytest.raises(ValueError, match=re.escape(f"{reason}, got {spec}")):
        ops.conv2d(x, weight, **options)
    with pytest.raises(ValueError, match=f"^{reason}, got the convolution"):
        torch.ops.fastdiff.conv2d(x, packed, spec.encode(), algorithm.number)


def test_each_spec_has_the_algorithms_that_it_should() -> None:
    """By hand; a new algorithm is to be added here."""
    found = {
        key: [n for n in ALGORITHMS if suits(n, spec, torch.float32)] for key, spec in SPECS.items()
    }
    tiles = ["split_bf16"] if isa() == "AMX" else []
    wanted = {
        "1x1": ["direct", "strassen"],
        "1x1 of 33 channels": ["direct"],
        "3x3": ["direct", "winograd2", "winograd4"],
        "3x3, stride 2": ["direct"],
        "3x3, upsampled": ["direct", "winograd2", "winograd4", "phases4"],
        "3x3, upsampled, padded oddly": ["direct", "winograd2", "winograd4"],
        "3x3 after SiLU": ["direct", "winograd2", "winograd4"],
        "5x5": ["direct"],
        "gated": ["direct", "strassen"],
        "gated, of 192 filters": [],
    }
    assert found == {key: names + tiles for key, names in wanted.items()}
    for dtype in DTYPES:
        assert [computable(spec, dtype) for spec in SPECS.values()] == [
            any(suits(n, spec, dtype) for n in ALGORITHMS) for spec in SPECS.values()
        ]
    products = ["direct_bf16"] if isa() in ("AVX512_BF16", "AMX") else []
    for key, spec in SPECS.items():
        names = [n for n in ALGORITHMS if suits(n, spec, torch.bfloat16)]
        after_silu = key == "3x3 after SiLU" and isa() == "AVX512_BF16"
        winograd = ["winograd2_bf16"] if after_silu else []
        phases = ["phases_bf16"] if products and "phases4" in wanted[key] else []
        assert names == wanted[key] + products + winograd + phases


def test_other_dtypes() -> None:
    for name, algorithm in ALGORITHMS.items():
        assert refusal(algorithm, OF_1X1, torch.float64) == f"{name} is not for torch.float64"
        assert not suits(name, OF_1X1, torch.float64)
    x, spec = torch.zeros(1, 32, 4, 4).half(), OF_1X1.encode()
    with pytest.raises(TypeError, match="direct is not for Half"):
        torch.ops.fastdiff.conv2d(x, torch.zeros(1), spec, ALGORITHMS["direct"].number)


@pytest.mark.parametrize(
    ("largest", "beyond"),
    [
        ({"filters": 2**20}, {"filters": 2**20 + 1}),
        ({"channels": 2**20}, {"channels": 2**20 + 1}),
        ({"kernel": (64, 64)}, {"kernel": (1, 65)}),
        ({"stride": (64, 64)}, {"stride": (65, 1)}),
        ({"padding": (64,) * 4}, {"padding": (0, 0, 0, 65)}),
    ],
)
def test_limits(largest, beyond) -> None:
    assert within_limits(replace(OF_1X1, **largest))
    assert not within_limits(replace(OF_1X1, **beyond))
    assert not suits("direct", replace(OF_1X1, **beyond))


def test_beyond_the_limits_the_reference_computes() -> None:
    x, weight = torch.randn(1, 2, 70, 3), torch.randn(3, 2, 1, 1)
    y, _ = ops.conv2d(x, weight, stride=(65, 1))
    with fastdiff.backend("reference"):
        assert torch.equal(y, ops.conv2d(x, weight, stride=(65, 1))[0])


# Python's part.


def test_numbers_and_back() -> None:
    spec = ConvSpec(7, 5, (3, 2), (4, 6), (8, 9, 10, 11), upsample=True, statistics=True)
    assert spec.encode() == (7, 5, 3, 2, 4, 6, 8, 9, 10, 11, 1, 0, 0, 1)
    assert ConvSpec.decode(spec.encode()) == spec
    assert hash(ConvSpec.decode(spec.encode())) == hash(spec)
    assert ConvSpec.decode((*spec.encode()[:10], 0, 1, 1, 0)) == replace(
        spec, upsample=False, silu=True, gated=True, statistics=False
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"filters": 0}, {"channels": -1}, {"kernel": (3,)}, {"kernel": (0, 3)}, {"filters": 2**63},
        {"stride": (1,)}, {"stride": (0, 1)}, {"stride": (1, 2**63)}, {"padding": (1, 1)},
        {"padding": (0, 0, -1, 0)}, {"padding": (2**64, 0, 0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_specs_that_no_convolution_has(bad) -> None:
    with pytest.raises(ValueError, match="wanted"):
        replace(OF_3X3, **bad)


def test_python_has_no_list_of_its_own() -> None:
    """It names the algorithm that suits every convolution, and in the self-check two to compare."""
    named = {}
    root = Path(fastdiff.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ALGORITHMS:
                named.setdefault(path.name, set()).add(node.value)
    assert named.pop("selfcheck.py") == {"direct", "winograd2"}
    assert set().union(*named.values()) == {"direct"}


def test_an_unknown_number() -> None:
    for number in (-1, len(ALGORITHMS)):
        with pytest.raises(ValueError, match=f"unknown algorithm {number}, wanted 0 to"):
            conv2d_algorithms.numbered(number)


WITHOUT = """
import sys, warnings
sys.modules["fastdiff._C"] = None
warnings.simplefilter("ignore")
import torch
from fastdiff import ops
from fastdiff.compiler.choose import algorithms
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, computable, within_limits
from fastdiff.ops.conv2d_spec import ConvSpec
x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
y, _ = ops.conv2d(x, weight, algorithm="winograd2")
assert torch.equal(y, torch.conv2d(x, weight))
spec = ConvSpec(6, 2, gated=True, padding=(99, 0, 0, 0))
assert not ALGORITHMS and computable(spec, x.dtype) and within_limits(spec)
assert algorithms.PRECISIONS == dict.fromkeys(("fast", "bf16", "strict"), ("plain",))
try:
    ops.conv2d_pack(weight, "direct")
except RuntimeError as error:
    print(error)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3))
with torch.no_grad():
    compiled = torch.compile(model, backend="fastdiff")(x)
    torch.testing.assert_close(compiled, model(x))
"""


def test_without_the_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("algorithm 'direct' cannot run here: the C++ extension was not")
