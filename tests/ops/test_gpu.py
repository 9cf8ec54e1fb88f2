"""Which operations have kernels for CUDA tensors, and that it is said as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdiff.ops import gpu, selfcheck

ROOT = Path(__file__).resolve().parents[2]
# Without the backwards of operations that are named themselves.
OPERATIONS = {
    name
    for name in selfcheck.CASES
    if not name.endswith("_backward") or name.removesuffix("_backward") not in selfcheck.CASES
}


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("docs/gpu.md", r"have no kernel for a GPU, [^.:]*: ((?:[^.]|\.md)*)\."),
        ("docs/operations.md", r"(`conv2d`(?:[^.]|\.md)*)\. PyTorch computes them there"),
    ],
)
def test_the_documentation_names_the_operations_without_a_kernel_for_gpus(page, sentence):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    said = re.search(sentence, text)
    assert said, sentence
    assert set(re.findall(r"`(\w+)`", said[1])) == OPERATIONS - set(gpu.operations)
    assert len(OPERATIONS - set(gpu.operations)) == 9


@pytest.mark.parametrize("chosen", ["triton", None], ids=str)
def test_the_self_check_says_what_computes_on_a_gpu(monkeypatch, chosen):
    monkeypatch.setattr(selfcheck, "on_cuda", lambda: chosen)
    x = type("OnGPU", (), {"is_cuda": True})()
    assert selfcheck._what_computes("q_sample", x) == (chosen or "reference")
    assert selfcheck._what_computes("conv2d", x) == "reference"
