"""The benchmark of whole pipelines: what is called, its check of images, its table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import rows, tables
from benchmarks.pipelines.peers import EAGER, PEERS
from benchmarks.pipelines.pipes import PIPES, call
from benchmarks.pipelines.report import Report
from benchmarks.pipelines.worker import Run, Worker
from benchmarks.turns.job import OURS, Case, Job
from benchmarks.turns.run import Settings

pytest.importorskip("diffusers")

HERE = {"cpu": "a", "isa": ["avx2"], "kernels": "AVX2", "cores": 2, "threads": 2,
        "native_bfloat16": False, "date": "2026-01-01", "versions": {}}  # fmt: skip
CASE = Case("tiny", 1, "float32", 1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A file of the images that float64 makes."""
    path = tmp_path_factory.mktemp("pipelines") / "expected.pt"
    Worker(Job(CASE, EAGER, path.parent, path, keep_heap=False)).expect()
    return path


def test_images_are_those_of_a_whole_call(expected):
    images = torch.load(expected)
    assert images.shape == (1, 3, 64, 64)
    assert images.dtype == torch.float64
    assert images.std() > 0.05
    assert ((images > 0) & (images < 1)).double().mean() > 0.5


@pytest.mark.parametrize("peer", [OURS, "eager channels_last"])
def test_a_peer_makes_the_images_of_float64(peer, expected):
    ready = Worker(Job(CASE, peer, expected.parent, expected, keep_heap=False)).prepare()
    assert ready.error < 1e-4


def test_wrong_images_are_refused(expected, monkeypatch):
    worker = Worker(Job(CASE, EAGER, expected.parent, expected, keep_heap=False))
    for wrong in (0.0, math.nan):
        monkeypatch.setattr(worker, "call", lambda value=wrong: torch.full((1, 3, 64, 64), value))
        with pytest.raises(ArithmeticError, match="wrong images"):
            worker.prepare()


def test_every_process_makes_the_same_pipeline():
    first, second = (PIPES["tiny"].make().unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_call_takes_guidance_steps(monkeypatch):
    """20 steps of two evaluations in one batch, as the benchmark says."""
    pipe, batches = PIPES["tiny"].make(), []
    pipe.unet.register_forward_hook(lambda _, given, out: batches.append(len(given[0])))
    call(pipe, PIPES["tiny"].inputs(1))
    assert batches == [2] * 20


def test_a_case_is_checked_and_timed(tmp_path):
    settings = Settings(
        rounds=1, limit=600, keep_heap=True, warm=False, breakdown=None, folder=tmp_path
    )
    report = Report(tmp_path)
    Run(CASE, [EAGER], settings, report.put).run()
    (record,) = report.records
    (made,) = record["rows"]
    assert record["finished"]
    assert made["failed"] is None
    assert made["median"] > 0
    assert 0 < made["error"] < 1e-5
    assert "1 image, float32" in report.markdown.read_text("utf-8")


def row(peer: str, median: float | None) -> dict[str, Any]:
    return {"peer": peer, "median": median, "failed": "wrong images" if median is None else None}


def test_the_table_has_ratios_to_our_time():
    case = {"kind": "call", "network": "small", "machine": HERE}
    results = {
        "records": [
            case
            | {
                "batch": 1,
                "dtype": "float32",
                "rows": [row(OURS, 1.0), row(EAGER, 2.5), row("eager channels_last", 3.0)],
            },
            case | {"batch": 4, "dtype": "bfloat16", "rows": [row(OURS, 2.0), row(EAGER, None)]},
        ]
    }
    assert rows.pipelines(results) == [
        ["", "1 image, float32", "4 images, bfloat16"],
        [PEERS[OURS].title, "1.00", "2.00"],
        [PEERS[EAGER].title, "2.50 (2.50x)", "failed"],
    ]


def test_a_table_without_figures_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured yet: `make bench-pipelines`" in tables.TABLES["pipelines"].text()
