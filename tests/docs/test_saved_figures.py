"""What the benchmarks keep: figures by what was measured, beside the machine they are of."""

from __future__ import annotations

import json

import pytest

from benchmarks import machine, rows
from benchmarks.comparison import Comparison, save

KEY = {"benchmark": "q_sample", "part": "", "shape": "4, 3", "dtype": "f32", "layout": "",
       "case": ""}  # fmt: skip


def comparison(ours: float, **key: str) -> Comparison:
    return Comparison(KEY | key, ours, {"torch": 3.0})


def test_a_later_run_replaces_its_own_figures_alone(tmp_path):
    path = tmp_path / "operations.json"
    save([comparison(1.0), comparison(1.0, dtype="bf16")], path)
    save([comparison(2.0)], path)
    results = json.loads(path.read_text("utf-8"))
    found = {one["dtype"]: one["ours"] for one in results["comparisons"]}
    assert found == {"f32": 2.0, "bf16": 1.0}
    assert len(results["machines"]) == 1
    head, line = rows.operations(results)
    assert line == ["`q_sample`", "4, 3", "2.00 s (1.50x)", "", "1.00 s (3.00x)", ""]
    assert head[2:] == ["f32 nchw", "f32 nhwc", "bf16 nchw", "bf16 nhwc"]


def test_machines_of_replaced_figures_are_forgotten(tmp_path, monkeypatch):
    path = tmp_path / "operations.json"
    save([comparison(1.0)], path)
    monkeypatch.setattr(machine, "facts", lambda threads: {"cpu": "another"})
    save([comparison(1.0, dtype="bf16")], path)
    assert len(json.loads(path.read_text("utf-8"))["machines"]) == 2
    save([comparison(1.0), comparison(1.0, dtype="bf16")], path)
    assert json.loads(path.read_text("utf-8"))["machines"] == [{"cpu": "another"}]


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (0.0125, "12.50 ms"), (17.5e-6, "17.5 us")]
)
def test_times_have_a_unit(seconds, text):
    assert rows.time_text(seconds) == text


def test_a_peer_that_failed_says_so():
    record = {"kind": "call", "network": "cifar10", "batch": 1, "dtype": "float32", "rows": [
        {"peer": "fastdiff", "median": 0.5, "failed": None},
        {"peer": "openvino", "median": None, "failed": "no memory"},
    ]}  # fmt: skip
    table = {row[0]: row[1] for row in rows.by_peer([record], 1)}
    assert table["fastdiff"] == "0.50"
    assert table["OpenVINO"] == "failed"
