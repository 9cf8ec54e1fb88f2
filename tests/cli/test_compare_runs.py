"""fastdiff report: the page of a run, or of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def two(copied_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of runs."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "losses.jsonl").write_bytes((copied_run / "losses.jsonl").read_bytes())
    return copied_run, other


def test_a_run_has_a_report_in_its_folder(run: Callable, two: tuple[Path, Path]) -> None:
    first, _ = two
    (first / "report.html").unlink(missing_ok=True)
    ran = run("report", "--run", first)
    assert ran.code == 0
    assert ran.last == f"done: {first}/report.html"
    assert first.name in (first / "report.html").read_text()


def test_runs_are_compared(run: Callable, two: tuple[Path, Path], tmp_path: Path) -> None:
    first, other = two
    ran = run("report", "--run", first, "--against", other, other)
    assert ran.last == f"done: {first}/comparison.html"
    assert run("report", "--run", first, "--out", tmp_path / "new" / "page.html").code == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_what_is_no_run_is_refused(run: Callable, tmp_path: Path) -> None:
    ran = run("report", "--run", tmp_path)
    assert ran.code == 2
    assert f"{tmp_path} is no folder of a run: it has no losses.jsonl" in ran.last
