"""Every instruction set that this processor has gives right results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.ops.backend import extension, isa

SCRIPT = """
import json, torch
from fastdiff import backend
from fastdiff.ops import selfcheck
from fastdiff.ops.backend import isa
torch.set_num_threads(1)
with backend("cpu"):
    bad = [f"{r.operation} {r.layout} {r.dtype}: {r.max_error} {r.reason}"
           for r in selfcheck.run() if not r.ok]
print(json.dumps({"isa": isa(), "bad": bad}))
"""

# The set that is built to emulate tiles, or runs them.
TILES = "AMX"
HERE = torch.backends.cpu.get_cpu_capability()
LEVELS = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512"}
# The sets of vectors; a build with one of them, as the sanitized ones are, runs that always.
BUILT = [name for name in extension.instruction_sets if name != TILES]
POSSIBLE = list(LEVELS)[: list(LEVELS).index(HERE) + 1]
LOWER = [] if len(BUILT) == 1 else [level for level in POSSIBLE if level in BUILT]
FOLDER = Path(__file__).parent
SHAPES = (
    "test_conv2d.py",
    "test_conv2d_phases.py",
    "test_conv2d_pointwise.py",
    "test_conv2d_weight_gradient.py",
    "test_attention.py",
    "test_attention_backward.py",
    "test_geglu.py",
    "test_group_norm_coefficients.py",
)


@pytest.mark.parametrize("wanted", [*LOWER, TILES, "best"])
def test_passes_the_self_check(wanted) -> None:
    given = ("ATEN_CPU_CAPABILITY", "FASTDIFF_ISA")
    environment = {k: v for k, v in os.environ.items() if k not in given}
    if wanted == TILES:
        environment["FASTDIFF_ISA"] = TILES
    elif wanted in LEVELS:
        environment["ATEN_CPU_CAPABILITY"] = LEVELS[wanted]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bad"] == []
    if wanted in (*LEVELS, TILES):
        assert found["isa"] == wanted
    elif len(BUILT) == 1:
        assert found["isa"] == BUILT[0]
    else:
        assert found["isa"] == TILES or found["isa"].startswith(HERE)


@pytest.mark.parametrize("wanted", [level for level in POSSIBLE if level not in LOWER])
def test_a_level_that_was_not_built_runs_the_next_lower_one(wanted) -> None:
    """As on a lesser processor than the one that a local build was made for."""
    done = subprocess.run(
        [sys.executable, "-c", "from fastdiff.ops.backend import isa; print(isa())"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": LEVELS[wanted]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    below = list(LEVELS)[: list(LEVELS).index(wanted)]
    expected = BUILT[0] if len(BUILT) == 1 else [level for level in below if level in BUILT][-1]
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("wanted", [level for level in LOWER if level != isa()])
def test_passes_the_tests_of_every_shape(wanted, pytestconfig) -> None:
    """Of the operations whose code differs by the width of vectors; the best set runs them too."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_values or threads"]
    done = subprocess.run(
        [sys.executable, *command, "-c", str(pytestconfig.inipath), *[FOLDER / f for f in SHAPES]],
        env={**os.environ, "ATEN_CPU_CAPABILITY": LEVELS[wanted]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


BF16 = "(test_values or threads or test_any) and bf16"


@pytest.mark.parametrize(
    "wanted", [s for s in ("AVX512_BF16", TILES) if s in extension.instruction_sets]
)
def test_passes_the_tests_of_bfloat16_products(wanted, pytestconfig) -> None:
    """By dot products and by tiles, which are emulated where the processor has none."""
    if wanted == isa():
        pytest.skip("runs in the other files")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", BF16]
    done = subprocess.run(
        [sys.executable, *command, "-c", str(pytestconfig.inipath), *[FOLDER / f for f in SHAPES]],
        env={**os.environ, "FASTDIFF_ISA": wanted},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("avx", "FASTDIFF_ISA is AVX, wanted DEFAULT, AVX2, AVX512, AVX512_BF16 or AMX"),
        ("AVX3", "FASTDIFF_ISA is AVX3, wanted"),
    ],
)
def test_an_unknown_set(given, message) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from fastdiff.ops.backend import isa; isa()"],
        env={**os.environ, "FASTDIFF_ISA": given},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert message in done.stderr
