"""fastdiff doctor: the facts, and an exit code that a failed check sets."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.checkpoints import checkpoint
from fastdiff.cli import doctor
from fastdiff.ops import selfcheck
from fastdiff.ops.backend import extension, isa, missing


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> selfcheck.Record:
    """The last check fails."""
    *good, last = selfcheck.run()
    bad = replace(last, ok=False, max_error=None, microseconds=None, reason="ValueError: no luck")
    monkeypatch.setattr(selfcheck, "run", lambda device="cpu": [*good, bad])
    return bad


def test_json_has_the_facts(run: Callable) -> None:
    ran = run("doctor", "--json")
    facts = ran.json
    assert ran.code == 0
    assert ran.err == ""
    assert facts["ok"] is True
    assert facts["fastdiff"] == fastdiff.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["models"] == list(checkpoint.shipped())
    assert list(facts["backends"]) == ["reference", "cpu", "triton", "cuda"]
    assert facts["backends"]["reference"] is None
    assert facts["backends"] == missing()
    if extension is None:
        assert facts["backend"] == "reference"
        assert "extension" in facts["backends"]["cpu"]
        assert facts["torch_compiled_against"] is None
    else:
        assert (facts["backend"], facts["isa"]) == ("cpu", isa())
        assert facts["backends"]["cpu"] is None
        assert facts["torch_compiled_against"] == extension.torch_version
    assert {check["operation"] for check in facts["self_check"]} == set(selfcheck.CASES)


def test_text_has_a_line_for_every_check(run: Callable) -> None:
    ran = run("doctor")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert sum(line.endswith("  ok") for line in lines) == len(selfcheck.run())
    triton = "runs" if missing()["triton"] is None else f"missing: {missing()['triton']}"
    assert f"backend triton     {triton}" in lines
    if extension is not None:
        (products,) = (line for line in lines if line.startswith("bfloat16 products"))
        how = {"AMX": "tiles", "AVX512_BF16": "by dot products"}.get(isa(), "in float32")
        assert how in products


def test_failed_check_sets_the_exit_code(run: Callable, broken: selfcheck.Record) -> None:
    ran = run("doctor", "--json")
    assert ran.code == 1
    assert ran.json["ok"] is False
    assert ran.json["self_check"][-1]["reason"] == broken.reason
    text = run("doctor")
    assert text.code == 1
    assert text.out.splitlines()[-1].endswith("FAILED ValueError: no luck")


def test_missing_backend_is_shown_with_its_reason(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "missing", lambda: {"cpu": "the compiler was on holiday"})
    lines = run("doctor").out.splitlines()
    assert "backend cpu        missing: the compiler was on holiday" in lines


@pytest.mark.parametrize(
    ("runs", "best", "more"),
    [
        pytest.param("AVX512", "AVX512", "", id="the best"),
        pytest.param("DEFAULT", "DEFAULT", "", id="no better one"),
        pytest.param("DEFAULT", "AVX2", "; AVX2 would be faster: reinstall fastdiff", id="moved"),
    ],
)
def test_instruction_sets_are_shown(
    run: Callable, monkeypatch: pytest.MonkeyPatch, runs: str, best: str, more: str
) -> None:
    built = SimpleNamespace(
        torch_version="2", instruction_sets=("DEFAULT", "AVX512"), emulates_tiles=False,
        why_no_tiles=lambda: "no tiles",
    )  # fmt: skip
    monkeypatch.setattr(doctor, "extension", built)
    monkeypatch.setattr(doctor, "isa", lambda: runs)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: best)
    (line,) = (one for one in run("doctor").out.splitlines() if one.startswith("instruction sets"))
    assert line.startswith(f"instruction sets   built for DEFAULT, AVX512; {runs} runs{more}")
    assert bool(more) == ("reinstall" in line)


def test_works_without_the_extension(start: Callable) -> None:
    process = start("doctor", "--json", before="sys.modules['fastdiff._C'] = None")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert facts["backend"] == "reference"
    assert "the C++ extension was not built" in facts["backends"]["cpu"]
    assert facts["torch_compiled_against"] is None
    assert all(check["ok"] for check in facts["self_check"])
    assert {check["backend"] for check in facts["self_check"]} == {"reference"}
