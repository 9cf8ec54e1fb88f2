"""Choosing what the operations run on."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff import ops, reference

module = importlib.import_module("fastdiff.backend")  # the attribute of that name is the class
needs_extension = pytest.mark.skipif(module.extension is None, reason=str(module.cpu_missing))


@pytest.fixture(autouse=True)
def _default_backend():
    """Whatever a test sets, the next one finds the default."""
    fastdiff.backend("auto")
    yield
    fastdiff.backend("auto")


@pytest.fixture
def reference_calls(monkeypatch):
    """A list that grows with every call of the reference's sampler_step."""
    calls = []
    original = reference.sampler_step

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(reference, "sampler_step", counted)
    return calls


def step(dtype=torch.float32):
    x = torch.ones(1, 1, 2, 2, dtype=dtype)
    table = torch.ones(1, 18, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return ops.sampler_step(x, x, None, None, table, torch.tensor(0))


def test_the_setting_and_the_context_manager(reference_calls):
    assert module.current() == "auto"
    with fastdiff.backend("reference"):
        assert module.current() == "reference"
        step()
        with fastdiff.backend("auto"):
            assert module.current() == "auto"
        assert module.current() == "reference"
    assert len(reference_calls) == 1
    assert module.current() == "auto"
    fastdiff.backend("reference")
    assert module.current() == "reference"
    step()
    assert len(reference_calls) == 2


def test_an_error_inside_restores_the_setting():
    with pytest.raises(ZeroDivisionError), fastdiff.backend("reference"):
        1 / 0  # noqa: B018
    assert module.current() == "auto"


@needs_extension
@pytest.mark.parametrize("name", ["auto", "cpu"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_the_kernels_run_on_cpu_tensors(name, dtype, reference_calls):
    with fastdiff.backend(name):
        assert module.kernel_runs(torch.ones(1, dtype=dtype))
        step(dtype)
    assert not reference_calls


@needs_extension
def test_other_tensors_run_on_the_reference():
    assert not module.kernel_runs(torch.ones(1, device="meta"))
    assert not module.kernel_runs(torch.ones(1, dtype=torch.int64))
    with fastdiff.backend("reference"):
        assert not module.kernel_runs(torch.ones(1))


@needs_extension
def test_what_it_says_about_itself():
    facts = module.describe()
    assert facts["backend"] == "cpu"
    assert facts["isa"] == module.isa()
    assert facts["isa"] != "none"
    assert facts["threads"] == torch.get_num_threads()
    with fastdiff.backend("reference"):
        assert module.describe()["backend"] == "reference"


def test_an_unknown_name_changes_nothing():
    fastdiff.backend("reference")
    with pytest.raises(ValueError, match="unknown backend 'tpu', wanted one of auto, reference"):
        fastdiff.backend("tpu")
    assert module.current() == "reference"


RUN_WITHOUT = """
import importlib, sys, warnings
{block}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastdiff
    from fastdiff import ops
warned = [str(w.message) for w in caught if "fastdiff" in str(w.message)]
module = importlib.import_module("fastdiff.backend")
assert module.describe()["backend"] == "reference" and module.isa() == "none"
x = torch.ones(1, 1, 2, 2)
assert ops.q_sample(x, torch.tensor([0]), x, torch.ones(1), torch.ones(1)).sum() == 8
try:
    fastdiff.backend("cpu")
except RuntimeError as error:
    print(error)
assert module.current() == "auto"
print(warned)
"""
NOT_BUILT = "sys.modules['fastdiff._C'] = None"
OF_ANOTHER_TORCH = """
import types
sys.modules["fastdiff._C"] = types.SimpleNamespace(torch_version="1.0")
"""
NOT_LOADABLE = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "fastdiff._C":
            raise ImportError("undefined symbol: _ZN2at")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        pytest.param(NOT_BUILT, "the C++ extension was not built: ", id="not built"),
        pytest.param(OF_ANOTHER_TORCH, "was built for torch 1.0, this is", id="another torch"),
        pytest.param(NOT_LOADABLE, "cannot be loaded: undefined symbol: _ZN2at", id="broken"),
    ],
)
def test_without_the_extension_it_runs_and_says_why(block, reason):
    code = RUN_WITHOUT.format(block=block)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, warned = done.stdout.splitlines()
    assert refused.startswith("backend 'cpu' cannot run here: ")
    assert reason in refused
    assert reason in warned or "FASTDIFF_CPU=0" in refused  # left out on purpose: no warning


def test_an_extension_left_out_on_purpose_is_no_reason_to_warn(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "backend.py"))
    (tmp_path / "_C.not_built").write_text("FASTDIFF_CPU=0 forbade it\n")
    assert (
        module._why_not_built("_C", "C++")
        == "the C++ extension was not built: FASTDIFF_CPU=0 forbade it"
    )
    assert not recwarn
    (tmp_path / "_C.not_built").write_text("no C++ compiler found\n")
    with pytest.warns(UserWarning, match="not built: no C\\+\\+ compiler found; running on the"):
        module._why_not_built("_C", "C++")


def test_an_object_can_be_entered_again() -> None:
    plain = fastdiff.backend("reference")
    for _ in range(2):
        with plain:
            assert module.current() == "reference"
        assert module.current() == "auto"
