"""The table of operation families in CONTRIBUTING.md, and that every family is whole."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

from fastdiff.ops import gpu
from tools import families as tool

FOUND = tool.families()
Q_SAMPLE = next(family for family in FOUND if family.name == "q_sample")
FOLDERS = ("csrc", "kernels", "benchmarks", "tests", "fastdiff/ops")


@pytest.fixture
def copy(tmp_path):
    """A copy of the tree's sources, which a test may spoil."""
    for folder in FOLDERS:
        source = tool.ROOT / folder
        ignored = shutil.ignore_patterns("__pycache__", "*.png", "*.json")
        shutil.copytree(source, tmp_path / folder, ignore=ignored)
    shutil.copy(tool.ROOT / "CONTRIBUTING.md", tmp_path)
    return tmp_path


def test_every_family_has_what_it_must_have():
    assert tool.problems(FOUND) == []


def test_operations_for_gpus_are_registered_with_pytorch():
    assert sorted(gpu.operations) == sorted(one for family in FOUND for one in family.on_gpu)
    for name in gpu.operations:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{name}", "CUDA")


def test_contributing_has_the_table_that_the_command_prints():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.families"],
        cwd=tool.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == tool.documented(), "run `python -m tools.families --write`"


def test_the_table_is_written_in_the_place_of_the_old_one(copy):
    path = copy / "CONTRIBUTING.md"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(tool.documented(), "| an old table |\n"), encoding="utf-8")
    tool.write(copy)
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"reference": False}, "fastdiff/ops/reference.py has no function q_sample"),
        ({"cpu": ("q_sample",)}, "csrc/cpu/q_sample.cpp registers"),
        ({"cpu": (), "on_gpu": ()}, "no kernel computes it"),
        ({"triton": ("q_sample",)}, "kernels/q_sample.py has"),
        ({"cuda": ()}, "csrc/cuda/bindings/q_sample.cpp registers"),
        ({"tests": ()}, "there is no tests/gpu/test_gpu_q_sample.py"),
        ({"benchmarks": ()}, "benchmarks/bench_q_sample.py does not time it"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_missing_is_said(changed, what):
    missing = list(dataclasses.replace(Q_SAMPLE, **changed).missing())
    assert any(what in line for line in missing), missing


@pytest.mark.parametrize(
    ("moved", "to", "what"),
    [
        ("csrc/cpu/q_sample.cpp", "csrc/cpu/noising.cpp", "which is of the family q_sample"),
        (
            "csrc/cuda/bindings/q_sample.cpp",
            "csrc/cuda/bindings/noise.cpp",
            "which is of the family q_sample",
        ),
        ("csrc/cuda/q_sample.cu", "csrc/cuda/noising.cu", "is named after no family"),
        ("csrc/cpu/kernels/geglu.cpp", "csrc/cpu/kernels/gate.cpp", "is named after no family"),
        ("kernels/q_sample.py", "kernels/noising.py", "kernels/q_sample.py has ()"),
        ("tests/ops/test_geglu.py", "tests/ops/test_gate.py", "no tests/ops/test_geglu.py"),
        ("benchmarks/bench_geglu.py", "benchmarks/bench_gate.py", "does not time it"),
    ],
    ids=lambda value: value if "/" in value and "." in value and " " not in value else "",
)
def test_a_file_under_another_name_is_said(copy, moved, to, what):
    (copy / moved).rename(copy / to)
    wrong = tool.problems(tool.families(copy), copy)
    assert any(what in line for line in wrong), wrong
