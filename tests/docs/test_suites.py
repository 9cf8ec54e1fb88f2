"""The benchmarks' suites: cases, what an interrupted run leaves to do, tables and the picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, rows, tables
from benchmarks.turns.job import Case
from benchmarks.unet import scaling
from benchmarks.unet.models import NETWORKS
from benchmarks.unet.peers import PEERS
from benchmarks.unet.report import Report
from benchmarks.unet.run import Run, Settings
from benchmarks.unet.suites import SUITES

HERE = {"cpu": "a", "isa": ["avx2"], "kernels": "AVX2", "cores": 2, "threads": None,
        "native_bfloat16": False, "date": "2026-01-01", "versions": {}}  # fmt: skip


def row(peer: str, median: float | None, **more: Any) -> dict[str, Any]:
    figures = {"first_call": 5.0, "warm_first_call": None}
    figures |= {"running_memory": 900.4, "peak_memory": 1000.0}
    failed = "no memory" if median is None else None
    return {"peer": peer, "median": median, "failed": failed} | figures | more


def record(case: Case, *made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "call", "machine": HERE, "finished": True, "rows": made} | case.key | more


def point(batch: int = 1, size: int = 32, threads: int = 2, dtype: str = "float32") -> Case:
    return Case("cifar10", batch, dtype, threads, size)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_cases_and_peers_are_known_and_named_once(suite):
    cases = suite.cases(4)
    assert len({case.title for case in cases}) == len(cases)
    assert {case.network for case in cases} <= set(NETWORKS)
    assert set(suite.peers) <= set(PEERS)


def test_scaling_varies_one_of_batch_size_and_threads():
    cases = [case for case in scaling.cases(6) if case.dtype == "bfloat16"]
    fixed = {"batch": 1, "size": 32, "threads": 6}
    varied = {
        axis: sorted(
            getattr(case, axis)
            for case in cases
            if all(getattr(case, other) == fixed[other] for other in fixed if other != axis)
        )
        for axis in fixed
    }
    assert varied == {
        "batch": [1, 2, 4, 8, 16, 32], "size": [16, 32, 64, 128], "threads": [1, 2, 4, 6],
    }  # fmt: skip
    assert len(cases) == 6 + 3 + 3  # all lines meet in one point


def test_the_size_is_that_of_the_inputs():
    network = NETWORKS["tiny"]
    assert network.sized(24).inputs(2)[0].shape == (2, 3, 24, 24)
    assert network.sized(None) is network


def test_a_resumed_run_repeats_what_did_not_end(tmp_path):
    report = Report(tmp_path, "scaling", scaling.text)
    report.put(record(point(), row("fastdiff", 0.5)))
    report.put(record(point(batch=2), row("fastdiff", 0.5), finished=False))
    report = Report(tmp_path, "scaling", scaling.text)
    assert report.has(point())
    for other in (point(batch=2), point(size=64), point(threads=1), point(dtype="bfloat16")):
        assert not report.has(other)


def test_records_of_a_suite_differ_in_size_and_threads(tmp_path):
    report = Report(tmp_path, "scaling", scaling.text)
    for case in (point(), point(size=64), point(threads=1), point()):
        report.put(record(case, row("fastdiff", 0.5)))
    assert len(report.records) == 3


def test_figures_of_another_processor_are_left_out(tmp_path):
    report = Report(tmp_path, "scaling", scaling.text)
    report.put(record(point(), row("fastdiff", 0.5)))
    report.put(record(point(batch=2), row("fastdiff", 0.5), machine=HERE | {"cpu": "b"}))
    here = HERE | {"date": "2027-01-01"}
    report.keep_processor(here)
    assert [one["batch"] for one in report.records] == [1]


def test_table_of_scaling_has_a_row_a_point():
    records = [
        record(point(8), row("fastdiff", 0.2), row("openvino", 0.5)),
        record(point(1), row("fastdiff", 0.04), row("openvino", None)),
        record(point(1, dtype="bfloat16"), row("fastdiff", 0.02), row("openvino", 0.03)),
    ]
    head, one, eight = rows.scaling({"records": records})
    assert head == ["batch", "size", "threads", "fastdiff, float32", "OpenVINO, float32",
                    "fastdiff, bfloat16", "OpenVINO, bfloat16"]  # fmt: skip
    assert one == ["1", "32", "2", "40.0", "failed", "20.0", "30.0 (1.50x)"]
    assert eight == ["8", "32", "2", "200.0", "500.0 (2.50x)", "", ""]


def test_a_curve_holds_what_varies_on_its_axis_alone():
    records = [
        record(point(4), row("fastdiff", 0.1)),
        record(point(1), row("fastdiff", 0.04)),
        record(point(2), row("fastdiff", None)),
        record(point(1, size=64), row("fastdiff", 0.3)),
        record(point(1, threads=1), row("fastdiff", 0.07)),
        record(point(8, dtype="bfloat16"), row("fastdiff", 0.1)),
    ]
    found = {axis: scaling.curve(records, axis, "float32", "fastdiff") for axis in scaling.AXES}
    assert found == {
        "batch": [(1, 40.0), (4, 100.0)],
        "size": [(32, 40.0), (64, 300.0)],
        "threads": [(1, 70.0), (2, 40.0)],
    }


def test_labels_keep_their_distance_and_order():
    assert scaling.apart([0.5, 0.1, 0.52], 0.1) == pytest.approx([0.5, 0.1, 0.6])
    assert scaling.apart([0.3, 0.3, 0.3], 0.1) == pytest.approx([0.3, 0.4, 0.5])


def test_the_picture_of_a_trial_run_stands_beside_its_figures(tmp_path):
    pytest.importorskip("matplotlib")
    peers = row("fastdiff", 0.04), row("openvino", 0.05), row("onnxruntime", None)
    scaling.draw([record(point(n), *peers) for n in (1, 2)], tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_run_that_cannot_draw_says_so_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"fastdiff\[plot\]"):
        scaling.draw([], tmp_path)


def test_tables_of_bfloat16_have_memory_and_first_calls():
    case = Case("vae", 1, "bfloat16", 2)
    peers = row("fastdiff", 0.5, warm_first_call=2.25), row("openvino", 1.0), row("eager", None)
    results = {"records": [record(case, *peers)]}
    title = "Stable Diffusion VAE decoder, 256x256, bfloat16, batch 1"
    assert rows.bfloat16_calls(results) == [
        ["", title], ["fastdiff", "500.0"], ["OpenVINO", "1000.0 (2.00x)"],
        ["diffusers, eager, NCHW", "failed"],
    ]  # fmt: skip
    assert rows.bfloat16_memory(results)[1:] == [
        ["fastdiff", "900, 1000"], ["OpenVINO", "900, 1000"],
    ]  # fmt: skip
    assert rows.bfloat16_first_calls(results)[1:] == [
        ["fastdiff", "5.0, 2.2"],
        ["OpenVINO", "5.0, -"],
    ]


def test_a_table_without_figures_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured yet: `make scaling`" in tables.TABLES["scaling"].text()


def test_a_table_with_a_picture_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    Report(tmp_path, "scaling", scaling.text).put(record(point(), row("fastdiff", 0.5)))
    assert "](images/scaling.png)\n" in tables.TABLES["scaling"].text()


@pytest.mark.parametrize(("threads", "text"), [(None, "2 cores"), (1, "1 thread of 2 cores")])
def test_the_line_on_a_machine_names_kernels_and_threads(threads, text):
    line = machine.line(HERE | {"threads": threads})
    assert line.startswith(f"a, avx2 (no native bfloat16), fastdiff on AVX2, {text}, 2026-01-01")


def test_a_case_is_timed_from_cold_and_from_warm_caches(tmp_path):
    """A whole run of one peer, in processes of its own."""
    settings = Settings(
        rounds=1, limit=600, keep_heap=True, warm=True, sampling=None, breakdown=None,
        folder=tmp_path,
    )  # fmt: skip
    saved: list[dict[str, Any]] = []
    Run(
        Case("tiny", 1, "float32", 1, size=8), ["eager channels_last"], settings, saved.append
    ).run()
    (made,) = saved[-1]["rows"]
    assert saved[-1]["finished"]
    assert (saved[-1]["size"], saved[-1]["threads"]) == (8, 1)
    assert made["failed"] is None
    assert made["median"] > 0
    assert made["first_call"] > 0
    assert made["warm_first_call"] > 0
    assert made["peak_memory"] >= made["running_memory"] > 0
    assert Path(tmp_path / "tiny-1-8.pt").is_file()
