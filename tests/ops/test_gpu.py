"""Which operations have kernels for CUDA tensors, and that it is said as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdiff.ops import gpu, selfcheck

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {name for name in selfcheck.CASES if not name.endswith("_backward")}


def test_the_readme_names_the_operations_without_a_kernel_for_gpus():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (said,) = re.findall(r"replaces a U-Net's layers on a CPU, ([^.]*), have neither", text)
    assert set(re.findall(r"`(\w+)`", said)) == OPERATIONS - set(gpu.operations)
    assert "and so do the five operations that have no kernel for a GPU" in text
    assert len(OPERATIONS - set(gpu.operations)) == 5


@pytest.mark.parametrize("chosen", ["triton", None], ids=str)
def test_the_self_check_says_what_computes_on_a_gpu(monkeypatch, chosen):
    monkeypatch.setattr(selfcheck, "on_cuda", lambda: chosen)
    x = type("OnGPU", (), {"is_cuda": True})()
    assert selfcheck._what_computes("q_sample", x) == (chosen or "reference")
    assert selfcheck._what_computes("conv2d", x) == "reference"
