"""The CUDA sources compile for every architecture, without spilled registers, and link."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.build import cuda, cuda_check
from tools.build.common import ROOT, CannotBuildError

PTXAS = """
ptxas info    : Compiling entry function 'kernel_a' for 'sm_80'
ptxas info    : Function properties for kernel_a
    8 bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 1328 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function 'kernel_b' for 'sm_90'
ptxas info    : Function properties for kernel_b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 6 registers, used 0 barriers, 368 bytes cmem[0]
"""


def test_the_cuda_part_compiles_without_spills_and_links() -> None:
    try:
        cuda.toolkit()
    except CannotBuildError as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [sys.executable, "-m", "tools.build.cuda_check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "cuda_check: passed" in done.stdout


def test_spilled_registers_are_found(tmp_path, capsys) -> None:
    (tmp_path / "q_sample.cu.o.log").write_text(PTXAS.format(stores=12))
    assert cuda_check.spills(tmp_path) == ["q_sample.cu: 16 bytes spilled on sm_80 by kernel_a"]
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["q_sample.cu", "sm_80", "1", "24", "1328", "8", "16"]
    assert second.split() == ["q_sample.cu", "sm_90", "1", "6", "0", "0", "0"]


def test_without_nvcc_the_check_says_so_and_passes(monkeypatch, capsys) -> None:
    def toolkit():
        raise CannotBuildError("nvcc was not found")

    monkeypatch.setattr(cuda_check, "toolkit", toolkit)
    assert cuda_check.run()
    assert capsys.readouterr().out == "cuda_check: skipped: nvcc was not found\n"


def test_a_symbol_that_nothing_provides_is_found(tmp_path) -> None:
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(
        'namespace c10::cuda { int found(); } int lost(); extern "C" int Py_Some();'
        "int all() { return c10::cuda::found() + lost() + Py_Some(); }"
    )
    cxx = cuda_check.compiler().split()
    subprocess.run([*cxx, "-shared", "-fPIC", source, "-o", library], check=True)
    try:
        cuda.toolkit()
    except CannotBuildError as reason:
        pytest.skip(str(reason))
    assert cuda_check.missing_symbols(library) == ["lost()"]
